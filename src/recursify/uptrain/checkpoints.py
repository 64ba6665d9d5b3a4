"""Training checkpoints: seals of checksums, the newest intact one after a crash, removal of old ones."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from recursify.errors import SettingsError, TrainingError

FOLDER = "checkpoints"
"""Subfolder of the output folder for the checkpoints."""
PREFIX = "checkpoint-"
SEAL_FILE = "seal.json"
"""File of a checkpoint with the checksums of its other files, written last."""
RUN_FILE = "run.json"
"""File beside the checkpoints with the settings that must not change on resume."""

logger = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int:
    """Number of steps done when ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in ``folder``, oldest first."""
    folders = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((path for path in folders if path.name.removeprefix(PREFIX).isdigit()), key=step_of)


def seal(checkpoint: Path) -> None:
    """Write the checksums of all files of ``checkpoint``, and sync everything to disk."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SEAL_FILE)
    sums = {str(file.relative_to(checkpoint)): _checksum(file) for file in files}
    (checkpoint / SEAL_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for file in [*files, checkpoint / SEAL_FILE]:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def find_damage(checkpoint: Path) -> str | None:
    """Describe the damage of ``checkpoint``; None if it is intact."""
    try:
        sums = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{SEAL_FILE} is missing or unreadable"
    for name, checksum in sums.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if _checksum(file) != checksum:
            return f"{name} has another checksum"
    return None


def newest_intact(folder: Path) -> Path | None:
    """Find the newest intact checkpoint; damaged ones are skipped with a warning."""
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = find_damage(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("'%s' is damaged (%s); trying the checkpoint before it.", checkpoint, reason)
    return None


def remove_old(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints except the newest ``keep`` and the best."""
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write the settings of a run that must not change on resume."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{RUN_FILE}"
    scratch.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    scratch.rename(folder / RUN_FILE)


def check_run(folder: Path, run: dict[str, Any]) -> None:
    """Check that a resumed run has the settings it started with.

    Raises:
        TrainingError: There is no run to resume.
        SettingsError: A setting differs; the message has both values.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise TrainingError(f"'{folder.parent}' has no run to resume. Omit --resume to start one.")
    before = json.loads(file.read_text(encoding="utf-8"))
    for key in sorted(before.keys() | run.keys()):
        if before.get(key) != run.get(key):
            raise SettingsError(
                f"Cannot resume: '{key}' was {before.get(key)!r} when the run in '{folder.parent}' started, and is "
                f"{run.get(key)!r} now. Use the old value, or start a new run with another -o."
            )


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]
