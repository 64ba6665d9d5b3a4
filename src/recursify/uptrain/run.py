"""Uptraining of a recursive model: checks of the settings, the choice of the stage, and its run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from recursify import plugins
from recursify.checkpoint.loading import require_recursive
from recursify.errors import RecursifyError, SettingsError, TrainingError
from recursify.modeling import RecursiveConfig
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from .arguments import check_trackers
from .exits import Exits
from .heal import Heal
from .liger_losses import check_backend
from .param_groups import check_optimizer
from .routers import Routers
from .settings import UptrainSettings
from .stage import Stage, TrainingRun, UptrainResult

STAGES: dict[str, type[Stage]] = {"heal": Heal, "exits": Exits, "routers": Routers}
"""Built-in stages by name; others are plug-ins (entry points of the group ``recursify.stages``)."""


def uptrain_model(
    model: str | Path,
    output: str | Path,
    *,
    settings: UptrainSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> UptrainResult:
    """Train a recursive model and write the result into a new folder.

    During the run ``output`` holds its checkpoints and metrics, at the end the model as well. When several processes
    train one model, each of them calls this.

    Args:
        model: Folder of a recursive model.
        output: Folder for the trained model.
        settings: Settings of the run; give these or ``options``.
        resume: Continue the interrupted run in ``output``.
        overwrite: Replace the contents of ``output``.
        progress: Callback that is called with the number of tokens after every step.
        **options: Fields of :class:`UptrainSettings`.

    Raises:
        RecursifyError: The model, the settings or the data cannot be used, or the run cannot continue.
    """
    settings = resolve_settings(UptrainSettings, settings, options)
    if resume and overwrite:
        raise SettingsError("resume continues the run in the output folder, overwrite deletes it. Give one of them.")
    stage = check_settings(settings)
    # Without an accelerator, accelerate starts its process group only when told that this is a run on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_backend(settings.loss_backend, state.device)
    source, output = require_recursive(model), Path(output)
    config = RecursiveConfig.from_pretrained(source)
    _check_model(source, config, stage, settings)
    try:
        return stage.train(TrainingRun(source, config, output, settings, state, resume, overwrite, progress))
    except RecursifyError as error:
        if state.is_main_process:
            raise
        raise type(error)(f"rank {state.process_index}: {error}") from error


def check_settings(settings: UptrainSettings) -> type[Stage]:
    """Check settings that depend on each other or on this environment, and return the stage that they name.

    Raises:
        SettingsError: The stage is unknown, or does not support the settings; or sharding is not possible.
    """
    stage = plugins.find("recursify.stages", settings.stage, STAGES, kind="stage", error=SettingsError)
    if settings.trainable in ("heads", "routers") and settings.trainable not in stage.trained_parts:
        raise SettingsError(
            f"Stage '{settings.stage}' does not train {settings.trainable}. Use another --trainable, or a stage that "
            f"does."
        )
    stage.check_settings(settings)
    check_optimizer(settings)
    check_trackers(settings.report_to)
    _check_sharding(settings)
    return stage


def _check_sharding(settings: UptrainSettings) -> None:
    """Check that nothing else shards the model, and that DeepSpeed is installed if it is to do so."""
    for name, ours in (("ACCELERATE_USE_FSDP", "fsdp2"), ("ACCELERATE_USE_DEEPSPEED", "zero2")):
        if os.environ.get(name, "false").lower() == "true":
            raise SettingsError(
                f"accelerate launch is configured to shard the model ({name}), which is not supported. Turn that off "
                f"and use --sharding {ours}."
            )
    if settings.sharding == "zero2" and importlib.util.find_spec("deepspeed") is None:
        raise SettingsError(
            "Sharding 'zero2' needs DeepSpeed, which is not installed. Run: pip install deepspeed. Or use --sharding "
            "fsdp2, which needs no other package."
        )


def _check_model(source: Path, config: RecursiveConfig, stage: type[Stage], settings: UptrainSettings) -> None:
    """Check that the stage can train a model of this config, on sequences of this length."""
    if config.router is not None and not stage.supports_routing:
        raise SettingsError(
            f"Stage '{settings.stage}' does not support routed models; this one has {config.router} routers. Train "
            f"routers last, or heal this model (--stage heal)."
        )
    if stage.needs_teacher and (config.depth_map is not None or config.anderson):
        raise TrainingError(
            f"Stage '{settings.stage}' takes the dense model's layers one by one, but '{source}' runs other recursions "
            f"than it was converted with (config.depth_map, config.anderson). Train the model that it was made from, "
            f"or use --stage heal."
        )
    context = config.max_position_embeddings
    if settings.length > context:
        raise SettingsError(
            f"length {settings.length} is longer than the model's context of {context} tokens. Use at most {context}."
        )
