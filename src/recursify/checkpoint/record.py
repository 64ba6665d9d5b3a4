"""Files of a recursive model besides its weights: config, modeling code, and the record of its making."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from recursify.errors import CheckpointError
from recursify.modeling import RecursiveConfig, code_files, copy_travelling_files

RECORD_FILE = "recursify.json"
"""Record of the conversion, uptraining and evaluation, sufficient to repeat them."""


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``recursify.json`` of a folder; empty if it has none.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / RECORD_FILE
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not valid JSON: {error}. Delete it, or fetch the model again.") from error


def write_model_files(folder: Path, config: RecursiveConfig, record: dict[str, Any]) -> None:
    """Write ``config.json``, ``recursify.json`` and the modeling code that a checkpoint includes."""
    config = config.as_saved()
    config.architectures = ["RecursiveForCausalLM"]
    config.save_pretrained(folder)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    copy_travelling_files(config, folder)


def travelling_code(folder: Path) -> tuple[str, ...]:
    """Names of the Python files that ``config.json`` of a folder refers to, with the files that these import.

    Raises:
        CheckpointError: A damaged config, or a file that is missing.
    """
    try:
        auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
        return code_files(auto_map, folder)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The modeling code in '{folder}' cannot be read: {error}. Convert again.") from error


def update_record(folder: Path, **entries: Any) -> dict[str, Any]:
    """Set ``entries`` in ``recursify.json`` of a folder atomically; returns its contents."""
    record = {**read_record(folder), **entries}
    scratch = folder / f".{RECORD_FILE}.writing"
    scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / RECORD_FILE)
    return record
