"""Stages that train the whole model at once, with the Trainer."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from recursify.errors import TrainingError
from recursify.evaluation.fingerprint import take_fingerprint
from recursify.modeling import RecursiveConfig, RecursiveForCausalLM

from . import checkpoints, sharding
from .arguments import training_arguments
from .callbacks import Watcher, draw_curves
from .data import TextData, prepare_data
from .loading import load_teacher, load_tokenizer, load_trainable_model
from .lora_balance import balance_factors
from .objectives import Objective
from .output import CHECKPOINT_FOLDER, SCRATCH_FOLDER, begin, check_output, find_resumed, publish
from .param_groups import freeze_untrained
from .settings import UptrainSettings
from .stage import Stage, TrainingRun, UptrainResult
from .trainer import RecursiveTrainer


class EndToEndStage(Stage, Objective):
    """A stage that is the objective of one :class:`RecursiveTrainer`; an instance belongs to one run."""

    @classmethod
    def train(cls, run: TrainingRun) -> UptrainResult:
        """Train with this objective, from the source or from the newest checkpoint."""
        settings, state = run.settings, run.state
        resumed = find_resumed(run) if run.resume else None
        if not run.resume and state.is_main_process:
            check_output(run)
        # A resumed run starts from the source as well: prepare() needs its weights, the checkpoint's follow.
        model, tokenizer = load_trainable_model(run), load_tokenizer(run)
        objective = cls(settings, load_teacher(run, needed=cls.needs_teacher))
        with state.main_process_first():
            data = prepare_data(settings, tokenizer)
        objective._prepare(model)
        if not run.resume:
            with state.main_process_first():
                if state.is_main_process:
                    begin(run)
        trainer = _make_trainer(run, model, objective, tokenizer, data, resumed is not None)
        _run_trainer(trainer, settings, resumed)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        changed = objective.calibrate(trained.eval(), partial(_first_sequences, data, settings.length))
        before, after = _held_out_figures(trainer, again=changed)
        objective.finish(trained)
        steps = trainer.state.global_step
        curves = draw_curves(run.output) if state.is_main_process else None
        result = UptrainResult(run.output, steps, steps * _tokens_per_step(run), before, after, curves)
        _write_model(trainer, run, result, data.name)
        return result

    def _prepare(self, model: RecursiveForCausalLM) -> None:
        """Prepare a freshly loaded model for training, in place."""
        settings = self.settings
        self.prepare(model)
        freeze_untrained(model, settings, self.trained_parts)
        balance_factors(model)
        if settings.gradient_checkpointing:
            # The model's method, per block layer and depth; the Trainer's argument is renamed in transformers v6.
            model.gradient_checkpointing_enable()
        if settings.sharding == "fsdp2":
            sharding.shard(model)


def _tokens_per_step(run: TrainingRun) -> int:
    settings = run.settings
    return settings.batch_size * settings.accumulate * settings.length * run.state.num_processes


def _make_trainer(
    run: TrainingRun,
    model: RecursiveForCausalLM,
    objective: Objective,
    tokenizer: Any,
    data: TextData,
    resumes: bool,
) -> RecursiveTrainer:
    settings = run.settings
    folder = run.output / CHECKPOINT_FOLDER
    arguments = training_arguments(settings, folder, world_size=run.state.num_processes, resumes=resumes)
    if model.config.router is not None and (model.config.router_kv == "shared" or not settings.router_weight):
        # Key norms that no recursion reads, and auxiliary routers without a loss, get no gradient.
        arguments.ddp_find_unused_parameters = True
    watcher = Watcher(run.output, _tokens_per_step(run), run.progress)
    return RecursiveTrainer(model, objective, settings, data, arguments, tokenizer, [watcher])


def _run_trainer(trainer: RecursiveTrainer, settings: UptrainSettings, resumed: Path | None) -> None:
    """Train to the end of the run.

    Raises:
        TrainingError: Out of memory.
    """
    try:
        if resumed is not None and checkpoints.step_of(resumed) >= trainer.args.max_steps:
            # All steps are done and only the model is missing; the Trainer would train one more step.
            trainer.state = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
            if sharding.is_sharded(trainer.model):
                sharding.load_model_shards(resumed, trainer.model)
            else:
                checkpoints.load_weights(resumed, trainer.model)
        else:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of memory with batch_size {settings.batch_size} and length {settings.length}: "
            f"{str(error).splitlines()[0]} Lower batch_size (and raise accumulate to compensate), or turn on "
            f"gradient_checkpointing."
        ) from error


def _first_sequences(data: TextData, length: int, num_tokens: int) -> list[Tensor]:
    """Ids ``[1, T]`` of the first training sequences, at least ``num_tokens`` tokens if there are as many."""
    count = min(len(data.train), -(-num_tokens // length))
    return [torch.tensor(data.train[row]["input_ids"])[None] for row in range(count)]


def _held_out_figures(trainer: RecursiveTrainer, *, again: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Figures before the first step (empty where not measured) and after the last.

    Args:
        trainer: The trainer after its last step.
        again: True to repeat an evaluation that was made after the last step.
    """
    if again or not any(line["step"] == trainer.state.global_step for line in _evaluations(trainer)):
        trainer.evaluate()
    lines = _evaluations(trainer)
    return _figures(lines[0]) if lines[0]["step"] == 0 else {}, _figures(lines[-1])


def _evaluations(trainer: RecursiveTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "eval_loss" in line]


def _figures(line: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}


def _write_model(trainer: RecursiveTrainer, run: TrainingRun, result: UptrainResult, data_name: str) -> None:
    """Write the trained model into the output folder, in the dtype of the source; all ranks call this."""
    scratch = run.output / SCRATCH_FOLDER
    trainer.save_model(str(scratch), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    dtype = RecursiveConfig.from_pretrained(run.source).dtype or torch.float32
    model = RecursiveForCausalLM.from_pretrained(scratch, dtype=dtype)
    shutil.rmtree(scratch)
    scratch.mkdir()
    model.save_pretrained(scratch)
    fingerprint = take_fingerprint(model.float().eval()).to_dict()
    publish(run, model.config, trainer.processing_class, result, data_name, fingerprint=fingerprint)
