"""Files of a recursive model besides its weights: config, modeling code, and the record of its making."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import recursify.modeling
from recursify.errors import CheckpointError
from recursify.modeling import TRAVELLING_FILES, RecursiveConfig
from recursify.modeling.configuration_recursive import AUTO_MAP

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
    config.architectures = [AUTO_MAP["AutoModelForCausalLM"].rpartition(".")[2]]
    config.save_pretrained(folder)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    home = Path(recursify.modeling.__file__).parent
    for file in TRAVELLING_FILES:
        shutil.copyfile(home / file, folder / file)


def update_record(folder: Path, **entries: Any) -> dict[str, Any]:
    """Set ``entries`` in ``recursify.json`` of a folder atomically; returns its contents."""
    record = {**read_record(folder), **entries}
    scratch = folder / f".{RECORD_FILE}.writing"
    scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / RECORD_FILE)
    return record
