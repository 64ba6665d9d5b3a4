"""``evaluate_model``: perplexity of a model on a text, and its agreement with a control on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from recursify.checkpoint.loading import load_model, require_exit
from recursify.errors import SettingsError
from recursify.progress import Progress, silent

from .perplexity import Perplexity, compare, perplexity
from .text import default_text, read_text, token_windows


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of a model on a text.

    Attributes:
        text: Name of the text.
        window: Tokens per window.
        depth: Recursion after which every token exited; None ran them all.
        model: Perplexity of the model.
        against: Name of the control; None without one.
        control: Perplexity of the control.
        agreement: Fraction of tokens on which both models have the same argmax.
        kl: Mean ``KL(control ‖ model)``, nats per token.
        run: Number of recursions, residual scale and Anderson depth, where the number was changed.
    """

    text: str
    window: int
    depth: int | None
    model: Perplexity
    against: str | None = None
    control: Perplexity | None = None
    agreement: float | None = None
    kl: float | None = None
    run: dict[str, Any] | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity of the model."""
        return self.model.perplexity

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return self.model.num_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON form: flat figures without a control, one mapping per model with one."""
        figures = asdict(self.model)
        if self.control is not None:
            figures = {
                "model": figures,
                "control": asdict(self.control),
                "top1_agreement": self.agreement,
                "kl": self.kl,
            }
        return {**(self.run or {}), "text": self.text, "window": self.window, "depth": self.depth, **figures}


def evaluate_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    against: str | Path | PreTrainedModel | None = None,
    data: str | Path | Iterable[str | Path] | None = None,
    length: int = 512,
    max_tokens: int | None = None,
    depth: int | None = None,
    recursions: int | None = None,
    residual_scale: float | None = None,
    anderson: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> EvaluationResult:
    """Measure perplexity on a text, and beside a control the agreement and the KL divergence.

    Args:
        model: Recursive or dense model: a folder, a ``.gguf`` file, a Hub id, or a loaded model in eval mode.
        tokenizer: Tokenizer of a loaded ``model``; read from the checkpoint otherwise.
        against: Control to measure on the same tokens, usually the dense model.
        data: Text files or folders (txt, md, jsonl, parquet); None takes Python's held-out help topics.
        length: Tokens per window.
        max_tokens: Number of tokens to stop after.
        depth: Recursion after which every token exits, 0 being the first.
        recursions: Number of times to apply the shared block, where it differs from the model's own.
        residual_scale: Factor on the steps of the shared layers; None takes the model's own number / ``recursions``.
        anderson: Anderson acceleration depth for repeated recursions.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: Device to run on, for instance ``cpu`` or ``cuda:1``.
        trust_remote_code: Permission to run Python code of the checkpoints.
        progress: Callback for the number of measured batches.

    Raises:
        CheckpointError: A model does not load, or the vocabularies differ.
        SettingsError: The model has no exit after ``depth``, or cannot run ``recursions``.
        TextError: The text is missing, unreadable or shorter than one window.
    """
    if depth is not None and recursions is not None:
        raise SettingsError("An exit depth belongs to the model's own recursions. Give either depth or recursions.")
    if length < 2 or (max_tokens is not None and max_tokens < 2):
        raise SettingsError(f"length and max_tokens must be at least 2, got {length} and {max_tokens}.")
    text = read_text(data) if data else default_text("held_out")
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    own_number: dict[str, Any] = {"recursions": recursions, "residual_scale": residual_scale, "anderson": anderson}
    name = _name(model)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise SettingsError("A loaded model has no tokenizer. Pass tokenizer=, or the model's folder.")
        if recursions is not None:
            raise SettingsError("recursions needs a checkpoint. Call model.with_recursions() on a loaded model.")
    else:
        model, tokenizer = load_model(model, **loading, **own_number)
    if depth is not None:
        require_exit(model.config, name, depth)
    windows = token_windows(tokenizer, text, length, max_tokens=max_tokens)
    control = against
    if against is not None and not isinstance(against, PreTrainedModel):
        control, _ = load_model(against, **loading)
    run = None if recursions is None else {**own_number, "residual_scale": model.config.residual_scale}
    if control is None:
        return EvaluationResult(
            text.name, length, depth, perplexity(model, windows, depth=depth, progress=progress), run=run
        )
    comparison = compare(model, control, windows, depth=depth, progress=progress)
    return EvaluationResult(
        text.name,
        length,
        depth,
        comparison.model,
        against=_name(against),
        control=comparison.control,
        agreement=comparison.top1_agreement,
        kl=comparison.kl,
        run=run,
    )


def _name(model: Any) -> str:
    return str(model.config.name_or_path if isinstance(model, PreTrainedModel) else model)
