"""An uptraining run from the settings to the finished folder: what the command line calls, once per process."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, open_checkpoint
from recursify.checkpoint.record import read_record, write_model_files
from recursify.checkpoint.recursive_checkpoint import RecursiveCheckpoint
from recursify.checkpoint.writer import ShardedCheckpoint, check_target
from recursify.errors import CheckpointError, OutputError, RecursifyError, SettingsError, TrainingError
from recursify.evaluation.fingerprint import take_fingerprint
from recursify.experiments.layer_healing import LayerHealing, require_same_layers
from recursify.experiments.soft_tying import SoftTying
from recursify.modeling import RecursiveConfig, RecursiveForCausalLM
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from . import checkpoints, sharding
from .callbacks import METRICS_FILE, Watcher, append_metrics, draw_curves
from .data import Collator, TextData, prepare_data
from .exits import Exits
from .liger_losses import check_backend
from .lora_balance import balance_factors
from .objectives import Heal, Objective
from .param_groups import choose_trained
from .routers import Routers
from .settings import UptrainSettings
from .trainer import RecursiveTrainer, training_arguments

STAGES: dict[str, type[Objective]] = {"heal": Heal, "tie": SoftTying, "exits": Exits, "routers": Routers}
"""Stage that trains end to end -> its objective."""

LAYER_STAGE = "layers"
"""The stage without one: see ``layer_healing.py``."""

CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True)
class TrainingRun:
    """What a run was asked to do.

    Attributes:
        source: The recursive model's folder.
        output: Where checkpoints, metrics and the finished model go.
        settings: Of the stage.
        state: The processes.
        resume: Go on where a run into ``output`` was.
        overwrite: Replace what is in ``output``.
        progress: Told how far it is.
    """

    source: Path
    output: Path
    settings: UptrainSettings
    state: PartialState
    resume: bool
    overwrite: bool
    progress: Progress

    def describe(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed; kept beside its checkpoints."""
        return {
            "model": str(self.source.absolute()),
            "num_processes": self.state.num_processes,
            **self.settings.to_dict(),
        }


@dataclass(frozen=True)
class UptrainResult:
    """Result of a finished run.

    Attributes:
        output: Folder of the trained model.
        steps: Number of optimizer steps.
        tokens: Number of training tokens, over all ranks.
        before: Held-out figures before the first step; empty where they were not measured.
        after: Held-out figures after the last step, of the float32 weights (written in the dtype of the source).
        curves: Plot of the losses; None without matplotlib.
    """

    output: Path
    steps: int
    tokens: int
    before: dict[str, float]
    after: dict[str, float]
    curves: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "output": str(self.output), "curves": None if self.curves is None else str(self.curves)}


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

    During the run ``output`` holds its checkpoints and metrics, at the end the model as well.

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
    source, output = Path(model), Path(output)
    settings = resolve_settings(UptrainSettings, settings, options)
    if settings.stage not in (*STAGES, LAYER_STAGE):
        raise SettingsError(f"Unknown stage '{settings.stage}'. Use one of: {', '.join((*STAGES, LAYER_STAGE))}.")
    _check_sharding(settings)
    # Without an accelerator it has to be told that processes are many on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_backend(settings.loss_backend, state.device)
    run = TrainingRun(source, output, settings, state, resume, overwrite, progress)
    return _heal_layers(run) if settings.stage == LAYER_STAGE else _train(run)


def _train(run: TrainingRun) -> UptrainResult:
    """A stage that trains the whole model at once, in the Trainer."""
    source, output, settings, state = run.source, run.output, run.settings, run.state
    folder = output / CHECKPOINT_FOLDER
    resumed = _find_resumed(folder, run.describe()) if run.resume else None
    if not run.resume and state.is_main_process:
        _check_output(source, output, run.overwrite)
    # Also a resumed run begins with the source: what a stage changes in prepare() is made from it, and then takes the
    # checkpoint's weights.
    model, tokenizer = _load(source, settings)
    _require_unrouted(model.config, settings)
    objective = STAGES[settings.stage](settings, _load_teacher(source, model, settings, state))
    with state.main_process_first():
        data = prepare_data(settings, tokenizer)
    _prepare_model(model, objective, settings)
    if not run.resume:
        with state.main_process_first():
            if state.is_main_process:
                _begin(run)
    arguments = training_arguments(settings, folder, world_size=state.num_processes, resumes=resumed is not None)
    if model.config.router is not None and (model.config.router_kv == "shared" or not settings.router_weight):
        # The norms of keys that no recursion reads, and auxiliary routers that nothing teaches, get no gradient.
        arguments.ddp_find_unused_parameters = True
    per_step = settings.batch_size * settings.accumulate * settings.length * state.num_processes
    trainer = RecursiveTrainer(
        model,
        objective,
        settings,
        data,
        arguments,
        tokenizer,
        [Watcher(output, per_step, run.progress)],
    )
    _run_trainer(trainer, settings, resumed)
    settled = objective.settle(
        trainer.accelerator.unwrap_model(trainer.model).eval(), partial(_first_sequences, data, settings.length)
    )
    before, after = _held_out_figures(trainer, again=settled)
    objective.finish(trainer.accelerator.unwrap_model(trainer.model))
    steps = trainer.state.global_step
    curves = draw_curves(output) if state.is_main_process else None
    result = UptrainResult(output, steps, steps * per_step, before, after, curves)
    _finish(trainer, source, result, settings, data.name)
    return result


def _prepare_model(model: RecursiveForCausalLM, objective: Objective, settings: UptrainSettings) -> None:
    """What is done to a model before its first step, in place."""
    objective.prepare(model)
    choose_trained(model, settings)
    balance_factors(model)
    if settings.gradient_checkpointing:
        # The model's own: per block layer and depth, never reentrant. The Trainer's argument changes its name in v6.
        model.gradient_checkpointing_enable()
    if settings.sharding == "fsdp2":
        sharding.shard(model)


def _require_unrouted(config: RecursiveConfig, settings: UptrainSettings) -> None:
    """Raises:
    SettingsError: A routed model in a stage that takes all tokens to be everywhere.
    """
    if config.router is not None and settings.stage not in ("heal", "routers"):
        raise SettingsError(
            f"Stage '{settings.stage}' trains a model all of whose tokens run all recursions, and this one has "
            f"{config.router} routers. Train routers last, or heal this model (--stage heal)."
        )


def _first_sequences(data: TextData, length: int, num_tokens: int) -> list[Tensor]:
    """Ids ``[1, T]`` of the first training sequences, ``num_tokens`` or all there are."""
    count = min(len(data.train), -(-num_tokens // length))
    return [torch.tensor(data.train[row]["input_ids"])[None] for row in range(count)]


def _held_out_figures(trainer: RecursiveTrainer, *, again: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Before the first step (empty where that was not measured) and after the last, if need be once again."""
    if again or not any(line["step"] == trainer.state.global_step for line in _evaluations(trainer)):
        trainer.evaluate()
    history = _evaluations(trainer)
    return _figures(history[0]) if history[0]["step"] == 0 else {}, _figures(history[-1])


def _evaluations(trainer: RecursiveTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "eval_loss" in line]


def _check_sharding(settings: UptrainSettings) -> None:
    """Refuse what would be ignored, or sharded by someone else."""
    for name, ours in (("ACCELERATE_USE_FSDP", "fsdp2"), ("ACCELERATE_USE_DEEPSPEED", "zero2")):
        if os.environ.get(name, "false").lower() == "true":
            raise SettingsError(
                f"accelerate launch was told to shard ({name}), which --sharding {ours} does. Use that, "
                f"and launch without."
            )
    if settings.sharding == "zero2" and importlib.util.find_spec("deepspeed") is None:
        raise SettingsError(
            "Sharding 'zero2' needs DeepSpeed, which is not installed. Run: pip install deepspeed. Or use --sharding "
            "fsdp2, which needs nothing."
        )


def _run_trainer(trainer: RecursiveTrainer, settings: UptrainSettings, resumed: Path | None) -> None:
    """Train to the end of the run.

    Raises:
        TrainingError: Out of memory.
    """
    try:
        if resumed is not None and checkpoints.step_of(resumed) >= trainer.args.max_steps:
            # Nothing is left but to write the model; the Trainer would train one more step.
            trainer.state = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
            if sharding.is_sharded(trainer.model):
                sharding.load_model_shards(resumed, trainer.model)
            else:
                checkpoints.load_weights(resumed, trainer.model)
        else:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of memory at {settings.batch_size} sequences of {settings.length} tokens: "
            f"{str(error).splitlines()[0]} Lower batch_size (raise accumulate to make up for it), or turn on "
            f"gradient_checkpointing."
        ) from error


def _heal_layers(run: TrainingRun) -> UptrainResult:
    """Stage ``layers``: neither model is ever whole in memory."""
    source, output, settings, state = run.source, run.output, run.settings, run.state
    if run.resume:
        raise TrainingError("Stage 'layers' is short and keeps no checkpoints. Run it again, with --overwrite.")
    if state.num_processes > 1:
        raise TrainingError(
            f"Stage 'layers' runs in one process, and {state.num_processes} were started. Leave out --num-processes."
        )
    _check_output(source, output, run.overwrite)
    student = RecursiveCheckpoint(source)
    _require_unrouted(student.config, settings)
    tokenizer = _load_tokenizer(source, student.config, settings)
    teacher = _open_teacher(source, student.config, settings)
    require_same_layers(teacher, student.names)
    data = prepare_data(settings, tokenizer)
    _begin(run)
    scratch = output / ".model"
    scratch.mkdir()
    weights = ShardedCheckpoint(scratch, student.tensors)
    for name in student.tensors:
        weights.write(name, student.read(name))
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    log = partial(append_metrics, output / METRICS_FILE)
    healing = LayerHealing(
        teacher,
        student.config,
        weights,
        data,
        Collator(settings.length, pad),
        settings,
        log=log,
        progress=run.progress,
        device=str(state.device),
    )
    before = healing.measure()
    log({"step": 0, "tokens": 0, **{f"eval_{name}": value for name, value in before.items()}})
    healing.run()
    after = healing.measure()
    log({"step": healing.steps, "tokens": healing.tokens, **{f"eval_{name}": value for name, value in after.items()}})
    result = UptrainResult(output, healing.steps, healing.tokens, before, after, draw_curves(output))
    _publish(scratch, source, student.config, tokenizer, result, settings, data.name, num_processes=1)
    return result


def _find_resumed(folder: Path, run: dict[str, Any]) -> Path | None:
    checkpoints.check_run(folder, run)
    return checkpoints.newest_intact(folder)


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something; a run that never saved anything is nothing."""
    folder = output / CHECKPOINT_FOLDER
    if checkpoints.list_checkpoints(folder) and not overwrite:
        raise OutputError(
            f"'{output}' holds a run already. Go on with it (--resume), replace it (--overwrite), or choose another -o."
        )
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    # Weights and AdamW's two moments, in float32, per checkpoint kept, and the model at the end.
    failed = (folder / checkpoints.RUN_FILE).exists() and not (output / "config.json").exists()
    check_target(output, source, overwrite=overwrite or failed, num_bytes=4 * size)


def _begin(run: TrainingRun) -> None:
    """Make the output folder, in place of what was there. By now, all that can be refused has been."""
    shutil.rmtree(run.output, ignore_errors=True)
    checkpoints.write_run(run.output / CHECKPOINT_FOLDER, run.describe())


def _load(source: Path, settings: UptrainSettings) -> tuple[RecursiveForCausalLM, Any]:
    """The model, in float32, and its tokenizer."""
    try:
        # All depths are trained, whatever depth the model runs at.
        model = RecursiveForCausalLM.from_pretrained(source, dtype=torch.float32, exit_depth=None)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"'{source}' does not load: {str(error).splitlines()[0]}") from error
    return model, _load_tokenizer(source, model.config, settings)


def _load_tokenizer(source: Path, config: RecursiveConfig, settings: UptrainSettings) -> Any:
    """The model's tokenizer, once it is certain that sequences fit the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"The tokenizer in '{source}' does not load: {str(error).splitlines()[0]}") from error
    context = config.max_position_embeddings
    if settings.length > context:
        raise SettingsError(
            f"length {settings.length} is longer than the model's context of {context} tokens. Use at most {context}."
        )
    return tokenizer


def _load_teacher(
    source: Path, model: RecursiveForCausalLM, settings: UptrainSettings, state: PartialState
) -> PreTrainedModel | None:
    """The dense teacher, frozen, in eval mode."""
    if not settings.kl_weight and not needs_teacher(settings):
        return None
    checkpoint = _open_teacher(source, model.config, settings)
    dtype = None if settings.teacher_dtype == "auto" else getattr(torch, settings.teacher_dtype)
    return checkpoint.load_model(dtype).to(settings.teacher_device or state.device).requires_grad_(False)


def needs_teacher(settings: UptrainSettings) -> bool:
    """Whether the stage reads the dense model even where no loss does."""
    return settings.stage == LAYER_STAGE or STAGES[settings.stage].needs_teacher


def _open_teacher(source: Path, config: RecursiveConfig, settings: UptrainSettings) -> DenseCheckpoint:
    """The dense teacher on disk.

    Raises:
        CheckpointError: There is none, or it has another vocabulary.
        TrainingError: The stage reads the teacher's layers by position, where the model has others.
    """
    if needs_teacher(settings) and (config.depth_map is not None or config.anderson):
        raise TrainingError(
            f"Stage '{settings.stage}' takes the dense model's layers one by one, and '{source}' runs other recursions "
            f"than it was made with (config.depth_map, config.anderson): they do not pair up. Train the model that it "
            f"was made from, or use --stage heal."
        )
    without = "" if needs_teacher(settings) else ", or --kl-weight 0 to learn from the data alone"
    name = settings.teacher or read_record(source).get("plan", {}).get("source")
    if name is None:
        raise CheckpointError(f"'{source}' does not say which dense model it was made from. Give --teacher{without}.")
    try:
        checkpoint = open_checkpoint(name)
    except RecursifyError as error:
        raise CheckpointError(f"The teacher does not open: {error} Give another --teacher{without}.") from error
    if checkpoint.config.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"The teacher '{name}' has {checkpoint.config.vocab_size} tokens in its vocabulary, and the model "
            f"{config.vocab_size}: their predictions are not about the same tokens. Give the dense model that "
            f"the recursive one was made from."
        )
    return checkpoint


def _figures(line: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}


def _finish(
    trainer: RecursiveTrainer, source: Path, result: UptrainResult, settings: UptrainSettings, data: str
) -> None:
    """Write the finished model into the output folder, in the dtype it came in, and the run into its history."""
    scratch = result.output / ".model"
    trainer.save_model(str(scratch), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    dtype = RecursiveConfig.from_pretrained(source).dtype or torch.float32
    model = RecursiveForCausalLM.from_pretrained(scratch, dtype=dtype)
    shutil.rmtree(scratch)
    scratch.mkdir()
    model.save_pretrained(scratch)
    _publish(
        scratch,
        source,
        model.config,
        trainer.processing_class,
        result,
        settings,
        data,
        num_processes=trainer.args.world_size,
        fingerprint=take_fingerprint(model.float().eval()).to_dict(),
    )


def _publish(
    scratch: Path,
    source: Path,
    config: RecursiveConfig,
    tokenizer: Any,
    result: UptrainResult,
    settings: UptrainSettings,
    data: str,
    *,
    num_processes: int,
    fingerprint: dict[str, Any] | None = None,
) -> None:
    """Move the weights in ``scratch`` into the output folder, with all else that makes a model's folder."""
    # What was measured of the model before is no longer true of it.
    record = {**read_record(source), "evaluation": [], "fingerprint": fingerprint}
    run = {
        "recursify_version": version("recursify"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_name": data,
        "hub_datasets": [name for name in settings.data or () if not Path(name).exists()],
        "tokens": result.tokens,
        "steps": result.steps,
        "num_processes": num_processes,
        "settings": settings.to_dict(),
        "before": result.before,
        "after": result.after,
    }
    record["history"] = [*record.get("history", []), run]
    write_model_files(scratch, config, record)
    tokenizer.save_pretrained(scratch)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
        # config.json comes last: a folder without it is no model, so none is ever half one.
        os.replace(file, result.output / file.name)
    scratch.rmdir()
