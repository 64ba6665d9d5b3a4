"""The Trainer's arguments, from the settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from recursify.errors import SettingsError, TrainingError

from .param_groups import transformers_optimizer
from .settings import UptrainSettings

logger = logging.getLogger(__name__)

ZERO2: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    # The optimizer is torch's, with our parameter groups, and not one of DeepSpeed's.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""DeepSpeed's settings for ``sharding: zero2``; the Trainer fills in ``auto``."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers to report to are installed.

    Raises:
        SettingsError: One of them is not.
    """
    trackers = get_available_reporting_integrations()
    if missing := [name for name in names if name not in trackers]:
        raise SettingsError(
            f"The tracker '{missing[0]}' is unknown or not installed. Installed: {', '.join(trackers) or 'none'}. "
            f"Install it; pip install 'recursify[track]' adds tensorboard and trackio."
        )


def training_arguments(settings: UptrainSettings, folder: Path, *, world_size: int, resumes: bool) -> TrainingArguments:
    """Make the Trainer's arguments.

    Args:
        settings: Settings of the stage.
        folder: Folder for checkpoints.
        world_size: Number of processes.
        resumes: True if the run continues from a checkpoint; it then starts without an evaluation.

    Raises:
        TrainingError: transformers rejects an argument.
    """
    try:
        arguments = TrainingArguments(**_fields(settings, folder, world_size, resumes))
    except (TypeError, ValueError, ImportError) as error:
        raise TrainingError(
            f"transformers rejects the training settings: {error} Change the setting that it names."
        ) from error
    if arguments.n_gpu > 1:
        # The Trainer would use DataParallel, whose replicas would share one block.
        logger.warning("Training on one GPU of %d. Use --num-processes for more.", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def tokens_per_step(settings: UptrainSettings, world_size: int) -> int:
    """Number of tokens of an optimizer step, over all ranks."""
    return settings.batch_size * settings.accumulate * settings.length * world_size


def _fields(settings: UptrainSettings, folder: Path, world_size: int, resumes: bool) -> dict[str, Any]:
    steps = math.ceil(settings.max_tokens / tokens_per_step(settings, world_size))
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup_fraction * steps),
        "optim": transformers_optimizer(settings),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        # In a step with fewer recursions the norms of deeper depths get no gradient.
        "ddp_find_unused_parameters": settings.random_recursions,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_every,
        "eval_on_start": not resumes,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": list(settings.report_to) or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "deepspeed": ZERO2 if settings.sharding == "zero2" else None,
        **settings.trainer,
    }
