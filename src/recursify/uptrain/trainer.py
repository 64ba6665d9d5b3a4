"""The training loop: transformers' Trainer, with our losses inside the model's forward and checkpoints that are whole.

What the Trainer does it keeps doing: accelerate's DDP and DeepSpeed, accumulation, schedulers, optimizers, trackers,
random states, and skipping to the right batch on resume. FSDP2 is in ``sharding.py``.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import SCHEDULER_NAME

from recursify.errors import SettingsError, TrainingError
from recursify.modeling import RecursiveForCausalLM

from . import checkpoints, sharding
from .data import IGNORED, Collator, TextData
from .losses import Sums
from .objectives import Objective
from .param_groups import HFAC, find_optimizer, parameter_groups
from .schedules import draw_recursions
from .settings import UptrainSettings

logger = logging.getLogger(__name__)

ZERO2: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    # The optimizer is torch's, in our groups, and not one of DeepSpeed's.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""DeepSpeed's settings for ``sharding: zero2``; the Trainer fills in what is ``auto``."""


class RecursiveTrainer(Trainer):
    """Trains a recursive model for one stage.

    Args:
        model: The model, float32.
        objective: What the stage minimizes.
        settings: The stage's settings.
        data: Packed sequences.
        arguments: From :func:`training_arguments`; ``output_dir`` is where the checkpoints go.
        tokenizer: Saved along with every checkpoint.
        callbacks: transformers' callbacks.
    """

    def __init__(
        self,
        model: RecursiveForCausalLM,
        objective: Objective,
        settings: UptrainSettings,
        data: TextData,
        arguments: TrainingArguments,
        tokenizer: Any,
        callbacks: list[Any],
    ):
        self.objective = objective
        self.settings = settings
        self._sums: Sums = {}
        self._scratch: Path | None = None
        self._micro_batch = 0
        if computes_in_bfloat16(settings.precision):
            # Matrix products of the model and, inside its objective, of the teacher; weights and losses stay float32.
            # Around the model's own forward: DeepSpeed turns off an autocast that is around its engine.
            autocast = torch.autocast(arguments.device.type, torch.bfloat16)
            model.forward = autocast(model.forward)
        pad = tokenizer.pad_token_id
        super().__init__(
            model=model,
            args=arguments,
            data_collator=Collator(settings.length, 0 if pad is None else pad),
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # Our losses divide by the number of predicted tokens of the whole step, on all ranks.
        self.model_accepts_loss_kwargs = True

    # --- Loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Predicted tokens of one step, over its micro-batches and all ranks."""
        count = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batch_samples)
        total = torch.as_tensor(count, device=device)
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the step's mean loss.

        Raises:
            TrainingError: It is NaN or infinite.
        """
        assert num_items_in_batch is not None, "every batch has labels"
        self.objective.begin_step(self.state.global_step, self.state.max_steps)
        total, sums = self._run(model, inputs, draw_recursions(self.settings, self._layout(), self.state))
        self._micro_batch += 1
        if not torch.isfinite(total):
            raise TrainingError(self._diverged(total))
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        # DDP and FSDP average gradients over ranks, and the divisor counts the tokens of all of them.
        loss = total * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return (loss, sums) if return_outputs else loss

    def _run(self, model: nn.Module, inputs: dict[str, Tensor], recursions: int | None) -> tuple[Tensor, Sums]:
        objective = partial(self.objective, inputs=inputs)
        plain = self.accelerator.unwrap_model(self.model)
        further = self.objective.forward_arguments(plain, recursions or plain.config.num_recursions)
        return model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            num_recursions=recursions,
            objective=objective,
            **further,
        )

    def _layout(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config.layout

    def _diverged(self, total: Tensor) -> str:
        value, step = float(total.detach()), self.state.global_step + 1
        return (
            f"The loss is {value} at step {step}, micro-batch {self._micro_batch} of this run, rank "
            f"{self.args.process_index}. {self._last_good()}. Try a lower learning rate, or look for broken rows in "
            f"the data."
        )

    def _last_good(self) -> str:
        last = checkpoints.list_checkpoints(Path(self.args.output_dir))
        return f"The last good checkpoint is '{last[-1]}'" if last else "No checkpoint had been written yet"

    def _refuse_nan_weights(self) -> None:
        """A NaN gradient leaves a finite loss and weights that are lost: such weights are not worth a checkpoint."""
        finite = [
            torch.isfinite(sharding.local_part(p.detach())).all() for p in self.model.parameters() if p.requires_grad
        ]
        bad = (~torch.stack([flag.to(self.args.device) for flag in finite])).sum()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if bad:
            raise TrainingError(
                f"The weights after step {self.state.global_step} hold NaN or infinities, so no checkpoint of them was "
                f"written. {self._last_good()}. Try a lower learning rate, or look for broken rows in the data."
            )

    # --- Optimizer -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the settings, over :func:`parameter_groups`."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            trained = model if model is not None else self.model
            kind, options = find_optimizer(self.settings, self.args, trained)
            self.optimizer = kind(parameter_groups(trained.named_parameters(), self.settings), **options)
        return self.optimizer

    # --- Measuring -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures per token since the last log."""
        if "loss" in logs and self._sums:
            logs = {**logs, **self._per_token(self._sums)}
            self._sums = {}
        super().log(logs, start_time)

    def _per_token(self, sums: Sums) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name].double() for name in names])
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values, "sum")
        figures = dict(zip(names, values.tolist(), strict=True))
        tokens = max(figures.pop("tokens"), 1.0)
        return {name: value / tokens for name, value in figures.items()}

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Cross-entropy and perplexity on held-out text, by depth too, and whatever else the objective counts."""
        # Without gradients DDP and DeepSpeed have nothing to do; FSDP2 gathers weights in the model's own forward.
        model = self.model
        was_training = model.training
        model.eval()
        sums: Sums = {}
        for inputs in self.get_eval_dataloader(eval_dataset):
            _, figures = self._run(model, self._prepare_inputs(inputs), None)
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value
        model.train(was_training)
        sharding.reshard(model)
        per_token = self._per_token(sums)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in per_token.items()}
        metrics[f"{metric_key_prefix}_loss"] = per_token["ce"]
        for name, nats in per_token.items():
            if name == "ce" or name.startswith("ce_depth_"):
                metrics[f"{metric_key_prefix}_perplexity{name.removeprefix('ce')}"] = perplexity_of(nats)
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- Checkpoints ---------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._scratch) if self._scratch is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, made in a hidden folder, synced, sealed and renamed.

        Raises:
            TrainingError: The disk is full, or the weights hold NaN; earlier checkpoints are untouched.
        """
        self._refuse_nan_weights()
        home = Path(self.args.output_dir)
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        self._scratch = home / ".writing"
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self._scratch, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                written = self._scratch / name
                checkpoints.seal(written)
                _sync_folder(written)
                shutil.rmtree(home / name, ignore_errors=True)
                written.rename(home / name)
                checkpoints.remove_old(home, keep=self.settings.keep, best_step=self._best_step())
        except (OSError, RuntimeError) as error:
            # torch.save and safetensors report a full disk as errors of their own.
            if isinstance(error, OSError) or any(sign in str(error) for sign in ("No space left", "write", "I/O")):
                raise TrainingError(
                    f"The checkpoint of step {self.state.global_step} could not be written to '{home}': {error}. "
                    f"Earlier checkpoints are whole: free some room and go on with --resume."
                ) from error
            raise
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model, as an ordinary folder. Checkpoints of a sharded one hold its shards instead."""
        if not sharding.is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
        elif self._scratch is None and (whole := sharding.gathered(self.model)) is not None:
            whole.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_shards(Path(output_dir), self.model, self._own_optimizer())
        if self.is_world_process_zero():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if sharding.is_sharded(self.model):
            sharding.load_model_shards(Path(resume_from_checkpoint), self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharding.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharding.load_optimizer_shards(Path(checkpoint), self.model, self._own_optimizer())
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, without accelerate's wrapper."""
        assert self.optimizer is not None
        wrapped: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return wrapped

    def _best_step(self) -> int | None:
        """The step of the checkpoint with the lowest held-out loss, of those that are still there."""
        there = {checkpoints.step_of(c) for c in checkpoints.list_checkpoints(Path(self.args.output_dir))}
        measured = [line for line in self.state.log_history if "eval_loss" in line and line["step"] in there]
        return min(measured, key=lambda line: line["eval_loss"])["step"] if measured else None


def training_arguments(settings: UptrainSettings, folder: Path, *, world_size: int, resumes: bool) -> TrainingArguments:
    """The Trainer's arguments for these settings, checkpoints going to ``folder``.

    Raises:
        SettingsError: A tracker that is not installed.
        TrainingError: transformers refuses one of them.
    """
    trackers = get_available_reporting_integrations()
    if missing := [name for name in settings.report_to if name not in trackers]:
        raise SettingsError(
            f"The tracker '{missing[0]}' is not installed, or unknown. Installed: {', '.join(trackers) or 'none'}. "
            f"Run, for instance: pip install tensorboard"
        )
    per_step = settings.batch_size * settings.accumulate * settings.length * world_size
    steps = math.ceil(settings.max_tokens / per_step)
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup_fraction * steps),
        # transformers does not know ours, which find_optimizer makes.
        "optim": "adamw_torch" if settings.optimizer == HFAC else settings.optimizer,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        # A count that changes leaves the norms of deeper depths without gradients for a step.
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
    try:
        arguments = TrainingArguments(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise TrainingError(f"transformers refuses the training settings: {error}") from error
    if arguments.n_gpu > 1:
        # The Trainer would copy the model to all of them by DataParallel, and the copies would share one block.
        logger.warning("Training on one GPU of %d. Give --num-processes to use more.", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def computes_in_bfloat16(precision: str) -> bool:
    """Whether matrix products are in bfloat16; ``auto`` takes it where a GPU has it."""
    return precision == "bfloat16" or (
        precision == "auto"
        and torch.cuda.is_available()
        # An emulated bfloat16 (T4, V100) is there too, and slower than float32.
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def perplexity_of(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _sync_folder(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
