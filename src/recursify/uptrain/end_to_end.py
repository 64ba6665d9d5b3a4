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
from recursify.modeling import RecursiveForCausalLM

from . import sharding
from .arguments import tokens_per_step, training_arguments
from .callbacks import Watcher, draw_curves
from .checkpoints import step_of
from .data import TextData, prepare_data, readable
from .param_groups import balance_factors, freeze_untrained
from .saving import check_saving
from .stage import Objective, Stage, TrainingRun, UptrainResult
from .trainer import RecursiveTrainer


class EndToEndStage(Stage, Objective):
    """A stage that is the objective of one :class:`RecursiveTrainer`; an instance belongs to one run."""

    @classmethod
    def train(cls, run: TrainingRun) -> UptrainResult:
        """Train with this objective, from the source or from the newest checkpoint."""
        settings, is_main = run.settings, run.state.is_main_process
        resumed = run.find_resumed() if run.resume else None
        if not run.resume and is_main:
            run.check_output()
        # A resumed run starts from the source as well: prepare() needs its weights, the checkpoint's follow.
        model, tokenizer = run.load_model(), run.load_tokenizer()
        objective = cls(settings, run.load_teacher(needed=cls.needs_teacher))
        with run.state.main_process_first():
            data = prepare_data(settings, tokenizer, model.config.vocab_size)
        objective._prepare(model)
        check_saving(run.source, model.config, tokenizer, model.generation_config)
        with run.state.main_process_first():
            if not run.resume and is_main:
                run.begin()
        trainer = _make_trainer(run, model, objective, tokenizer, data, resumed is not None)
        with readable(data.name):
            _run_trainer(trainer, resumed)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        changed = objective.calibrate(trained.eval(), partial(_first_sequences, data, settings.length))
        before, after = _held_out_figures(trainer, again=changed)
        objective.finish(trained)
        steps = trainer.state.global_step
        tokens = steps * tokens_per_step(settings, run.state.num_processes)
        result = UptrainResult(run.output, steps, tokens, before, after, draw_curves(run.output) if is_main else None)
        _write_model(trainer, run, result, data.name)
        return result

    def _prepare(self, model: RecursiveForCausalLM) -> None:
        """Prepare a freshly loaded model for training, in place."""
        self.prepare(model)
        freeze_untrained(model, self.settings, self.trained_parts)
        balance_factors(model)
        if self.settings.gradient_checkpointing:
            # The model's method, per block layer and depth; the Trainer's argument is renamed in transformers v6.
            model.gradient_checkpointing_enable()
        if self.settings.sharding == "fsdp2":
            sharding.shard(model)


def _make_trainer(
    run: TrainingRun, model: RecursiveForCausalLM, objective: Objective, tokenizer: Any, data: TextData, resumes: bool
) -> RecursiveTrainer:
    settings, world_size = run.settings, run.state.num_processes
    arguments = training_arguments(settings, run.checkpoints, world_size=world_size, resumes=resumes)
    if model.config.router is not None and (model.config.router_kv == "shared" or not settings.router_weight):
        # Key norms that no recursion reads, and auxiliary routers without a loss, get no gradient.
        arguments.ddp_find_unused_parameters = True
    watcher = Watcher(run.output, tokens_per_step(settings, world_size), run.progress)
    return RecursiveTrainer(model, objective, data, arguments, tokenizer, [watcher])


def _run_trainer(trainer: RecursiveTrainer, resumed: Path | None) -> None:
    """Train to the end of the run, and report if memory does not suffice."""
    try:
        if resumed is not None and step_of(resumed) >= trainer.args.max_steps:
            # All steps are done and only the model is missing; the Trainer would train one more step.
            trainer.state = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))
            trainer._load_from_checkpoint(str(resumed))
        else:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except torch.OutOfMemoryError as error:
        settings = trainer.settings
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
    """Figures before the first step (empty where not measured) and after the last, evaluated ``again`` if needed."""
    history = trainer.state.log_history
    if again or not any("eval_loss" in line and line["step"] == trainer.state.global_step for line in history):
        trainer.evaluate()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    first, last = (
        {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}
        for line in (lines[0], lines[-1])
    )
    return first if lines[0]["step"] == 0 else {}, last


def _write_model(trainer: RecursiveTrainer, run: TrainingRun, result: UptrainResult, data_name: str) -> None:
    """Write the trained model into the output folder, in the dtype of the source; all ranks call this."""
    trainer.save_model(str(run.scratch), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    model = RecursiveForCausalLM.from_pretrained(run.scratch, dtype=run.config.dtype or torch.float32)
    shutil.rmtree(run.scratch)
    run.scratch.mkdir()
    model.save_pretrained(run.scratch)
    fingerprint = take_fingerprint(model.float().eval())
    run.publish(model.config, trainer.processing_class, result, data_name, fingerprint)
