"""The training loop: transformers' Trainer, with our losses inside the model's forward and checkpoints that are whole.

What the Trainer does it keeps doing: accelerate's DDP, FSDP and DeepSpeed, mixed precision, accumulation, schedulers,
optimizers, trackers, random states, and skipping to the right batch on resume.
"""

from __future__ import annotations

import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments

from recursify.errors import TrainingError
from recursify.modeling import RecursiveForCausalLM

from . import checkpoints
from .data import IGNORED, Collator, TextData
from .hfac import HFac
from .objectives import Objective
from .schedules import draw_recursions
from .settings import UptrainSettings

Sums = dict[str, Tensor]


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
        return model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            num_recursions=recursions,
            objective=objective,
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
        finite = [torch.isfinite(p.detach()).all() for p in self.model.parameters() if p.requires_grad]
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
        """Residuals, norms and biases have a learning rate of their own; vectors have no weight decay.

        A shared weight gathers the gradients of all depths, a residual those of one, so one rate rarely fits both.
        """
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            trained = model if model is not None else self.model
            is_hfac = self.settings.optimizer == "hfac"
            kind, options = self._hfac() if is_hfac else self.get_optimizer_cls_and_kwargs(self.args, trained)
            own = self.settings.lora_learning_rate or self.settings.learning_rate
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    key = (is_per_depth(name), decays(name, parameter))
                    groups.setdefault(key, []).append(parameter)
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "lr": own if per_depth else self.settings.learning_rate,
                        "weight_decay": self.settings.weight_decay if decayed else 0.0,
                        **({"factored": decayed} if is_hfac else {}),
                    }
                    for (per_depth, decayed), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _hfac(self) -> tuple[Any, dict[str, Any]]:
        """H-Fac and its options, as ``get_optimizer_cls_and_kwargs`` has those of transformers."""
        return HFac, {"betas": (self.args.adam_beta1, self.args.adam_beta2)}

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
        """Cross-entropy and perplexity on held-out text, and whatever else the objective counts."""
        # Without gradients DDP has nothing to do; FSDP still gathers weights in its own forward.
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        was_training = model.training
        model.eval()
        sums: Sums = {}
        for inputs in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager():
                _, figures = self._run(model, self._prepare_inputs(inputs), None)
            for name, value in figures.items():
                sums[name] = sums[name] + value if name in sums else value
        model.train(was_training)
        per_token = self._per_token(sums)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in per_token.items()}
        metrics[f"{metric_key_prefix}_loss"] = per_token["ce"]
        metrics[f"{metric_key_prefix}_perplexity"] = perplexity_of(per_token["ce"])
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

    def _best_step(self) -> int | None:
        """The step of the checkpoint with the lowest held-out loss, of those that are still there."""
        there = {checkpoints.step_of(c) for c in checkpoints.list_checkpoints(Path(self.args.output_dir))}
        measured = [line for line in self.state.log_history if "eval_loss" in line and line["step"] in there]
        return min(measured, key=lambda line: line["eval_loss"])["step"] if measured else None


def training_arguments(settings: UptrainSettings, folder: Path, *, world_size: int, resumes: bool) -> TrainingArguments:
    """The Trainer's arguments for these settings, checkpoints going to ``folder``.

    Raises:
        TrainingError: transformers refuses one of them.
    """
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
        # transformers does not know ours, which create_optimizer makes.
        "optim": "adamw_torch" if settings.optimizer == "hfac" else settings.optimizer,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        # A count that changes leaves the norms of deeper depths without gradients for a step.
        "ddp_find_unused_parameters": settings.random_recursions,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
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
        **settings.trainer,
    }
    try:
        return TrainingArguments(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise TrainingError(f"transformers refuses the training settings: {error}") from error


def is_per_depth(name: str) -> bool:
    """Whether a parameter belongs to one depth: a residual, a norm or a bias inside the shared block."""
    return ".block." in name and not name.endswith(".linear.weight")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms and to biases (which are ``[R, O]`` when relaxed)."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def choose_trained(model: RecursiveForCausalLM, trainable: str) -> None:
    """Freeze what ``trainable`` leaves out.

    Raises:
        TrainingError: Nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        if trainable == "lora":
            parameter.requires_grad_(is_per_depth(name))
        elif trainable == "shared":
            parameter.requires_grad_(".block." in name and name.endswith(".linear.weight"))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(f"This model has no parameters that trainable '{trainable}' names.")


def perplexity_of(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _sync_folder(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
