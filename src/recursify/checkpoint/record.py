"""What lies in a recursive model's folder beside its weights: config, modeling files, and how it was made."""

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
"""How the model was made: enough to make it again."""


def read_record(folder: Path) -> dict[str, Any]:
    """``recursify.json`` of a folder; empty where it has none.

    Raises:
        CheckpointError: It is damaged.
    """
    file = folder / RECORD_FILE
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not valid JSON: {error}.") from error


def write_model_files(folder: Path, config: RecursiveConfig, record: dict[str, Any]) -> None:
    """Write ``config.json``, ``recursify.json`` and the modeling files that travel along."""
    config.architectures = [AUTO_MAP["AutoModelForCausalLM"].rpartition(".")[2]]
    config.save_pretrained(folder)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    home = Path(recursify.modeling.__file__).parent
    for file in TRAVELLING_FILES:
        shutil.copyfile(home / file, folder / file)


def update_record(folder: Path, **entries: Any) -> dict[str, Any]:
    """Put ``entries`` into ``recursify.json`` of a folder, in one step; returns the whole of it."""
    record = {**read_record(folder), **entries}
    beside = folder / f".{RECORD_FILE}.writing"
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / RECORD_FILE)
    return record
