"""``evaluate_model``: perplexity of a model on a text, and its agreement with a control on the same tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from recursify.checkpoint.loading import load_model, require_exit
from recursify.errors import SettingsError
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from .perplexity import Perplexity, compare, perplexity
from .settings import EvaluationSettings
from .text import default_text, num_context, read_text, text_start, token_windows


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of a model on a text.

    Attributes:
        text: Name of the text.
        window: Tokens per window.
        window_start: Tokens that the tokenizer begins a text with, at the start of each window.
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
    window_start: tuple[str, ...]
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
            control = asdict(self.control)
            figures = {"model": figures, "control": control, "top1_agreement": self.agreement, "kl": self.kl}
        windows = {"text": self.text, "window": self.window, "window_start": list(self.window_start)}
        return {**(self.run or {}), **windows, "depth": self.depth, **figures}


def evaluate_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    against: str | Path | PreTrainedModel | None = None,
    settings: EvaluationSettings | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> EvaluationResult:
    """Measure perplexity on a text, and beside a control the agreement and the KL divergence.

    Args:
        model: Recursive or dense model: a folder, a ``.gguf`` file, a Hub id, or a loaded model in eval mode.
        tokenizer: Tokenizer of a loaded ``model``; read from the checkpoint otherwise.
        against: Control to measure on the same tokens, usually the dense model.
        settings: Settings; give these or ``options``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: Device to run on, for instance ``cpu`` or ``cuda:1``.
        trust_remote_code: Permission to run Python code of the checkpoints.
        progress: Callback for the number of measured batches.
        options: Fields of :class:`~recursify.evaluation.settings.EvaluationSettings`.

    Raises:
        CheckpointError: A model does not load, or the vocabularies differ.
        SettingsError: The settings are invalid, or the model does not support them.
        TextError: The text is missing, unreadable or shorter than one window.
    """
    settings = resolve_settings(EvaluationSettings, settings, options)
    text = read_text(settings.data) if settings.data else default_text("held_out")
    loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise SettingsError("A loaded model has no tokenizer. Pass tokenizer=, or the model's folder.")
        if settings.recursions is not None:
            raise SettingsError("recursions needs a checkpoint. Call model.with_recursions() on a loaded model.")
        loaded = model
    else:
        loaded, tokenizer = load_model(model, **loading, **settings.loading)
    depth = settings.depth
    if depth is not None:
        require_exit(loaded.config, _name(model), depth)
    vocab_size = loaded.config.vocab_size
    windows = token_windows(tokenizer, text, settings.length, max_tokens=settings.max_tokens, vocab_size=vocab_size)
    how: dict[str, Any] = {"depth": depth, "num_context": num_context(tokenizer), "progress": progress}
    start = tuple(tokenizer.convert_ids_to_tokens(text_start(tokenizer)))
    facts: dict[str, Any] = {"text": text.name, "window": settings.length, "window_start": start, "depth": depth}
    if settings.recursions is not None:
        facts["run"] = {**settings.loading, "residual_scale": loaded.config.residual_scale}
    if against is None:
        return EvaluationResult(model=perplexity(loaded, windows, **how), **facts)
    control = against if isinstance(against, PreTrainedModel) else load_model(against, **loading)[0]
    comparison = compare(loaded, control, windows, **how)
    facts |= {"control": comparison.control, "agreement": comparison.top1_agreement, "kl": comparison.kl}
    return EvaluationResult(model=comparison.model, against=_name(against), **facts)


def _name(model: str | Path | PreTrainedModel) -> str:
    return str(model.config.name_or_path if isinstance(model, PreTrainedModel) else model)
