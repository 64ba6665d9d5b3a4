"""The output folder of a run: its checkpoints while it trains, the model and its record at the end."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recursify.checkpoint.record import read_record, write_model_files
from recursify.checkpoint.writer import check_target
from recursify.errors import OutputError
from recursify.modeling import RecursiveConfig

from . import checkpoints
from .stage import TrainingRun, UptrainResult

CHECKPOINT_FOLDER = "checkpoints"
SCRATCH_FOLDER = ".model"
"""Subfolder for the finished model until its files are moved into place."""


def check_output(run: TrainingRun) -> None:
    """Check that a new run may write into the output folder; one without checkpoints and model may be replaced.

    Raises:
        OutputError: The folder is not empty, or the disk is too small.
    """
    folder = run.output / CHECKPOINT_FOLDER
    if checkpoints.list_checkpoints(folder) and not run.overwrite:
        raise OutputError(
            f"'{run.output}' already contains a run. Continue it (--resume), replace it (--overwrite), or choose "
            f"another -o."
        )
    failed = (folder / checkpoints.RUN_FILE).exists() and not (run.output / "config.json").exists()
    # Each checkpoint has the weights and AdamW's two moments in float32; the model is written at the end.
    size = sum(file.stat().st_size for file in run.source.glob("*.safetensors"))
    check_target(run.output, run.source, overwrite=run.overwrite or failed, num_bytes=4 * size)


def begin(run: TrainingRun) -> None:
    """Create the output folder and delete its old contents. Call it after everything that can be refused."""
    shutil.rmtree(run.output, ignore_errors=True)
    checkpoints.write_run(run.output / CHECKPOINT_FOLDER, run.describe())


def find_resumed(run: TrainingRun) -> Path | None:
    """The newest intact checkpoint of the run in the output folder.

    Raises:
        TrainingError: The folder has no run.
        SettingsError: That run has other settings.
    """
    folder = run.output / CHECKPOINT_FOLDER
    checkpoints.check_run(folder, run.describe())
    return checkpoints.newest_intact(folder)


def publish(
    run: TrainingRun,
    config: RecursiveConfig,
    tokenizer: Any,
    result: UptrainResult,
    data_name: str,
    *,
    fingerprint: dict[str, Any] | None = None,
) -> None:
    """Complete the model in the scratch folder and move it into the output folder.

    Args:
        run: The run.
        config: Config of the trained model.
        tokenizer: Tokenizer to save with it.
        result: Result, for the record.
        data_name: Name of the training data, for the record.
        fingerprint: Fingerprint of the trained model, for the record.
    """
    scratch, settings = run.output / SCRATCH_FOLDER, run.settings
    entry = {
        "recursify_version": version("recursify"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_name": data_name,
        "hub_datasets": [name for name in settings.data or () if not Path(name).exists()],
        "tokens": result.tokens,
        "steps": result.steps,
        "num_processes": run.state.num_processes,
        "settings": settings.to_dict(),
        "before": result.before,
        "after": result.after,
    }
    record = read_record(run.source)
    # Evaluations of the source are not valid for the trained model.
    record |= {"evaluation": [], "fingerprint": fingerprint, "history": [*record.get("history", []), entry]}
    write_model_files(scratch, config, record)
    tokenizer.save_pretrained(scratch)
    # config.json is moved last: a folder without it is not a model, so an interruption leaves no incomplete model.
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, run.output / file.name)
    scratch.rmdir()
