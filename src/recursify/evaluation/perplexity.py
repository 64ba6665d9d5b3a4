"""Perplexity of a model, and the agreement of its predictions with another model's."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from recursify.errors import CheckpointError
from recursify.progress import Progress, silent

TOKENS_PER_BATCH = 2048
"""Tokens per forward pass."""
LOGIT_BYTES = 2**26
"""Maximum bytes of one tensor of float32 logits, whatever the vocabulary; a comparison has about six of them."""


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood of a text.

    Attributes:
        perplexity: ``exp(loss)``.
        loss: Nats per predicted token.
        num_tokens: Number of predicted tokens: all but the leading ones of each window that are context.
    """

    perplexity: float
    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Comparison:
    """A model beside its control on the same tokens.

    Attributes:
        model: Perplexity of the model.
        control: Perplexity of the control.
        top1_agreement: Fraction of tokens on which both models have the same argmax.
        kl: Mean ``KL(control ‖ model)``, nats per token.
    """

    model: Perplexity
    control: Perplexity
    top1_agreement: float
    kl: float

    def as_evaluation(self, text: str) -> dict[str, Any]:
        """Entry of ``evaluation`` in ``recursify.json`` for the text of this name."""
        return {
            "kind": "text",
            "name": text,
            "depth": None,
            "num_tokens": self.model.num_tokens,
            "perplexity": self.model.perplexity,
            "dense_perplexity": self.control.perplexity,
            "top1_agreement": self.top1_agreement,
            "kl": self.kl,
        }


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    num_context: int = 1,
    depth: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity of ``model`` over token windows ``[N, T]``, with logits cast to float32.

    The first ``num_context`` tokens of each window are not predicted. With a ``depth``, every token exits after that
    recursion.
    """
    loss = 0.0
    for batch in _batches(windows, model.config.vocab_size, progress):
        for logprobs, targets in _predictions(model, batch, num_context, depth):
            loss += _negative_log_likelihood(logprobs, targets)
    return _perplexity(loss, windows, num_context)


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    control: PreTrainedModel,
    windows: Tensor,
    *,
    num_context: int = 1,
    depth: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models over token windows ``[N, T]``; with a ``depth``, every token of ``model`` exits there.

    The first ``num_context`` tokens of each window are not predicted.

    Raises:
        CheckpointError: The vocabularies differ, so predictions cannot be compared token by token.
    """
    if model.config.vocab_size != control.config.vocab_size:
        raise CheckpointError(
            f"The model has a vocabulary of {model.config.vocab_size} tokens and the control one of "
            f"{control.config.vocab_size}: their predictions cannot be compared. Use a control with the same tokenizer."
        )
    model_loss = control_loss = num_agreeing = divergence = 0.0
    for batch in _batches(windows, model.config.vocab_size, progress):
        pairs = zip(
            _predictions(model, batch, num_context, depth), _predictions(control, batch, num_context), strict=True
        )
        for (logprobs, targets), (control_logprobs, _) in pairs:
            model_loss += _negative_log_likelihood(logprobs, targets)
            control_loss += _negative_log_likelihood(control_logprobs, targets)
            num_agreeing += float((logprobs.argmax(-1) == control_logprobs.argmax(-1)).sum())
            divergence += float(F.kl_div(logprobs, control_logprobs, log_target=True, reduction="sum"))
    figures = _perplexity(model_loss, windows, num_context)
    control_figures = _perplexity(control_loss, windows, num_context)
    count = figures.num_tokens
    return Comparison(figures, control_figures, num_agreeing / count, divergence / count)


@torch.inference_mode()
def precompute_states(model: PreTrainedModel, windows: Tensor, *, progress: Progress = silent) -> None:
    """Run the layers of ``model`` over token windows ``[N, T]`` and release them; the model then knows these only.

    Its hidden states ``[N, T, D]`` and its head stay in memory, and :func:`compare` and :func:`perplexity` find the
    same figures on the same windows. So two models can be compared of which one fits in memory.
    """
    body = model.base_model
    batches = _batches(windows, model.config.vocab_size, progress, "measure dense")
    outputs = itertools.cycle([body(batch.to(model.device), use_cache=False) for batch in batches])
    body._modules.clear()
    body.forward = lambda *_, **__: next(outputs)
    for parameter in model.parameters():  # a view of a file that is mapped into memory keeps all of it there
        parameter.data = parameter.data.clone()


def _predictions(
    model: PreTrainedModel, batch: Tensor, num_context: int, depth: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities ``[n, V]`` (float32, on the CPU) and targets ``[n]``, chunk by chunk of a batch ``[b, T]``."""
    rows, length = batch.shape
    per_chunk = max(1, LOGIT_BYTES // (4 * model.config.vocab_size * rows))
    for kept, logits in _logits(model, batch, range(num_context - 1, length - 1), per_chunk, depth):
        logprobs = logits.float().cpu().flatten(0, 1).log_softmax(-1)
        yield logprobs, batch[:, kept.start + 1 : kept.stop + 1].flatten()


def _logits(
    model: PreTrainedModel, batch: Tensor, positions: range, per_chunk: int, depth: int | None
) -> Iterator[tuple[range, Tensor]]:
    """Logits ``[b, n, V]`` of up to ``per_chunk`` positions at a time, in one pass of the layers.

    The family's own ``forward`` computes each chunk, with all that it does to its logits.
    """
    arguments: dict[str, Any] = {"use_cache": False} | ({} if depth is None else {"exit_depth": depth})
    ids, body = batch.to(model.device), model.base_model
    can_chunk = body is not model and "logits_to_keep" in inspect.signature(model.forward).parameters
    if batch.shape[1] <= per_chunk or not can_chunk:
        yield positions, model(ids, **arguments).logits[:, positions.start : positions.stop]
        return
    forward, outputs = body.forward, []

    def record(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return outputs[0]

    for start in range(positions.start, positions.stop, per_chunk):
        kept = range(start, min(start + per_chunk, positions.stop))
        with _replaced_forward(body, (lambda *_, **__: outputs[0]) if outputs else record):
            logits = model(ids, logits_to_keep=torch.tensor(kept, device=ids.device), **arguments).logits
        yield kept, logits


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which ``module`` computes ``forward``."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _negative_log_likelihood(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(-1, targets.unsqueeze(-1)).double().sum())


def _perplexity(total: float, windows: Tensor, num_context: int) -> Perplexity:
    count = windows[:, num_context:].numel()
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count)


def _batches(windows: Tensor, vocab_size: int, progress: Progress, stage: str = "measure") -> Iterator[Tensor]:
    rows = min(TOKENS_PER_BATCH // windows.shape[1], LOGIT_BYTES // (4 * vocab_size))
    batches = windows.split(max(1, rows))
    for done, batch in enumerate(batches, start=1):
        yield batch
        progress(stage, done, len(batches))
