"""The training loop: transformers' Trainer with losses inside the model's forward and crash-safe checkpoints.

The Trainer provides accelerate's DDP and DeepSpeed, accumulation, schedulers, optimizers, trackers, random states, and
the position in the data on resume. FSDP2 is in ``sharding.py``.
"""

from __future__ import annotations

import math
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from recursify.errors import TrainingError
from recursify.modeling import LayerLayout, RecursiveForCausalLM

from . import checkpoints, sharding
from .data import IGNORED, Collator, TextData, padding_token
from .losses import Sums, add_sums
from .param_groups import find_optimizer, parameter_groups
from .settings import UptrainSettings
from .stage import Objective


class RecursiveTrainer(Trainer):
    """Trainer of a recursive model for one stage.

    Args:
        model: Model in float32.
        objective: Loss of the stage.
        data: Packed sequences.
        arguments: Arguments from :func:`~recursify.uptrain.arguments.training_arguments`.
        tokenizer: Tokenizer to save with every checkpoint.
        callbacks: Callbacks of transformers.
    """

    def __init__(
        self,
        model: RecursiveForCausalLM,
        objective: Objective,
        data: TextData,
        arguments: TrainingArguments,
        tokenizer: Any,
        callbacks: list[Any],
    ):
        self.objective = objective
        self.settings = settings = objective.settings
        self._sums: Sums = {}
        self._scratch: Path | None = None
        self._micro_batch = 0
        if _computes_in_bfloat16(settings.precision):
            # For the matrix products of the model and, inside its objective, of the teacher; weights and losses stay
            # float32. It wraps the model's own forward, since DeepSpeed disables an autocast around its engine.
            autocast = torch.autocast(arguments.device.type, torch.bfloat16)
            model.forward = autocast(model.forward)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=Collator(settings.length, padding_token(tokenizer, model.config.vocab_size)),
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # Losses are divided by the number of predicted tokens of the whole step, over all ranks.
        self.model_accepts_loss_kwargs = True

    # --- Loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Number of predicted tokens of one step, over its micro-batches and all ranks."""
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
        """The contribution of a micro-batch to the mean loss of the step.

        Raises:
            TrainingError: The loss is NaN or infinite.
        """
        assert num_items_in_batch is not None, "every batch has labels"
        self.objective.begin_step(self.state.global_step, self.state.max_steps)
        layout = self.accelerator.unwrap_model(self.model).config.layout
        total, sums = self._run(model, inputs, draw_recursions(self.settings, layout, self.state))
        self._micro_batch += 1
        if not torch.isfinite(total):
            raise TrainingError(
                f"The loss is {float(total.detach())} at step {self.state.global_step + 1}, micro-batch "
                f"{self._micro_batch} of this run, rank {self.args.process_index}. {self._remedy()}"
            )
        add_sums(self._sums, sums)
        # DDP and FSDP average gradients over ranks, and the divisor counts the tokens of all of them.
        loss = total * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return (loss, sums) if return_outputs else loss

    def _run(self, model: nn.Module, inputs: dict[str, Tensor], recursions: int | None) -> tuple[Tensor, Sums]:
        unwrapped = self.accelerator.unwrap_model(self.model)
        return model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            num_recursions=recursions,
            objective=partial(self.objective, inputs=inputs),
            **self.objective.forward_arguments(unwrapped, recursions or unwrapped.config.num_recursions),
        )

    def _remedy(self) -> str:
        intact = checkpoints.list_checkpoints(Path(self.args.output_dir))
        last = f"The last good checkpoint is '{intact[-1]}'" if intact else "No checkpoint had been written yet"
        return f"{last}. Use a lower learning rate, or check the data for broken rows."

    def _check_weights(self) -> None:
        """Check the weights before a checkpoint: after a NaN gradient they are NaN, while the loss was finite."""
        finite = [
            torch.isfinite(sharding.local_shard(p.detach())).all() for p in self.model.parameters() if p.requires_grad
        ]
        bad = (~torch.stack([flag.to(self.args.device) for flag in finite])).sum()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, "sum")
        if bad:
            raise TrainingError(
                f"The weights after step {self.state.global_step} contain NaN or infinities, so they were not saved. "
                f"{self._remedy()}"
            )

    # --- Optimizer -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the settings, with :func:`parameter_groups`."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = find_optimizer(self.settings, self.args, model)
            self.optimizer = optimizer_class(parameter_groups(model.named_parameters(), self.settings), **options)
        return self.optimizer

    # --- Measuring -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures per token since the last log."""
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
        """Measure cross-entropy, perplexity and the objective's other figures on held-out text, also by depth."""
        # Without gradients DDP and DeepSpeed are not needed; FSDP2 gathers weights in the model's own forward.
        model = self.model
        was_training = model.training
        model.eval()
        sums: Sums = {}
        for inputs in self.get_eval_dataloader(eval_dataset):
            add_sums(sums, self._run(model, self._prepare_inputs(inputs), None)[1])
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
        """Write the Trainer's checkpoint into a hidden folder, seal it with checksums and rename it.

        Raises:
            TrainingError: The disk is full, or the weights contain NaN; earlier checkpoints stay as they are.
        """
        self._check_weights()
        folder = Path(self.args.output_dir)
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        self._scratch = folder / ".writing"
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self._scratch, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                checkpoints.seal(self._scratch / name)
                shutil.rmtree(folder / name, ignore_errors=True)
                (self._scratch / name).rename(folder / name)
                checkpoints.remove_old(folder, keep=self.settings.keep, best_step=self._best_step())
        except (OSError, RuntimeError) as error:
            # torch.save and safetensors raise a RuntimeError when the disk is full.
            if isinstance(error, OSError) or any(sign in str(error) for sign in ("No space left", "write", "I/O")):
                raise TrainingError(
                    f"The checkpoint of step {self.state.global_step} could not be written to '{folder}': {error}. "
                    f"Earlier checkpoints are intact: free some disk space and continue with --resume."
                ) from error
            raise
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model as an ordinary folder; checkpoints of a sharded one contain its shards instead."""
        if not sharding.is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
        elif self._scratch is None and (gathered := sharding.gathered(self.model)) is not None:
            gathered.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_shards(Path(output_dir), self.model, self._torch_optimizer())
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
        sharding.load_optimizer_shards(Path(checkpoint), self.model, self._torch_optimizer())
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        assert self.optimizer is not None
        wrapped: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return wrapped

    def _best_step(self) -> int | None:
        """Step of the existing checkpoint with the lowest held-out loss."""
        steps = {checkpoints.step_of(c) for c in checkpoints.list_checkpoints(Path(self.args.output_dir))}
        measured = [line for line in self.state.log_history if "eval_loss" in line and line["step"] in steps]
        return min(measured, key=lambda line: line["eval_loss"])["step"] if measured else None


def _computes_in_bfloat16(precision: str) -> bool:
    """Tell whether matrix products are in bfloat16; ``auto`` uses it if the GPU has it natively."""
    return precision == "bfloat16" or (
        precision == "auto"
        and torch.cuda.is_available()
        # Emulated bfloat16 (T4, V100) is slower than float32.
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def draw_recursions(settings: UptrainSettings, layout: LayerLayout, state: TrainerState) -> int | None:
    """Number of recursions of the step after ``state.global_step``; None for all.

    It depends on seed and step only, so that all ranks and a resumed run draw the same: if ranks ran different numbers,
    their collectives would wait for each other forever.
    """
    if not settings.random_recursions:
        return None
    progress = state.global_step / max(1, state.max_steps)
    fewest = _fewest_recursions(settings, layout.num_recursions, progress)
    return random.Random(f"{settings.seed}:{state.global_step}").randint(fewest, layout.num_recursions)


def _fewest_recursions(settings: UptrainSettings, num_recursions: int, progress: float) -> int:
    """The smallest number of recursions that may be drawn at ``progress`` (0 .. 1) of a run.

    It falls from all to one over the first ``recursion_curriculum`` of the steps: a converted model is good at full
    depth only and learns shallower depths from there.
    """
    if settings.recursion_curriculum == 0:
        return 1
    done = min(1.0, progress / settings.recursion_curriculum)
    return max(1, num_recursions - math.floor(done * num_recursions))


def perplexity_of(loss: float) -> float:
    """``exp(loss)``; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
