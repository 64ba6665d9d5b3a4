"""Training checkpoints: written beside and renamed, sealed with checksums, found again after a crash."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from recursify.checkpoint.shards import shard_files
from recursify.errors import SettingsError, TrainingError

PREFIX = "checkpoint-"
SEAL_FILE = "seal.json"
"""Inside a checkpoint: the checksum of every file. Written last."""
RUN_FILE = "run.json"
"""Beside the checkpoints: the settings that every part of a resumed run has in common."""

logger = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int:
    """The step after which ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    found = [c for c in folder.glob(f"{PREFIX}*") if c.is_dir() and c.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def seal(checkpoint: Path) -> None:
    """Note the checksum of every file of ``checkpoint``."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SEAL_FILE)
    sums = {str(file.relative_to(checkpoint)): _checksum(file) for file in files}
    (checkpoint / SEAL_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def what_is_damaged(checkpoint: Path) -> str | None:
    """Why ``checkpoint`` cannot be resumed from, or None."""
    try:
        sums = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no readable {SEAL_FILE}"
    for name, checksum in sums.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if _checksum(file) != checksum:
            return f"{name} is not what was written"
    return None


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all what was written; damaged ones are skipped with a warning."""
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = what_is_damaged(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("'%s' is damaged (%s); going back to the one before it.", checkpoint, reason)
    return None


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Read the weights of ``checkpoint`` into ``model``, as its objective prepared it."""
    for shard in sorted(set(shard_files(checkpoint).values())):
        unexpected = model.load_state_dict(load_file(checkpoint / shard), strict=False).unexpected_keys
        assert not unexpected, f"{checkpoint} was written by another model: {unexpected}"


def remove_old(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest ``keep`` and the best."""
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Note what a resumed run must have in common with this one."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{RUN_FILE}"
    scratch.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    scratch.rename(folder / RUN_FILE)


def check_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to resume with other settings than the run began with.

    Raises:
        TrainingError: There is nothing to resume.
        SettingsError: A setting differs; the message names it with both values.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise TrainingError(f"There is no run to resume in '{folder.parent}'. Leave out --resume to begin one.")
    before = json.loads(file.read_text(encoding="utf-8"))
    for key in sorted(before.keys() | run.keys()):
        if before.get(key) != run.get(key):
            raise SettingsError(
                f"Cannot resume: '{key}' was {before.get(key)!r} when the run in '{folder.parent}' began, and is "
                f"{run.get(key)!r} now. Use the old value, or begin a new run with another -o."
            )


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]
