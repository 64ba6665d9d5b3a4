"""Perplexity of a model, and the agreement of its predictions with another model's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from recursify.errors import CheckpointError
from recursify.progress import Progress, silent

TOKENS_PER_BATCH = 2048
"""Tokens per forward pass: two sets of float32 logits over a vocabulary of 49 152 then take 0.8 GB."""


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood of a text.

    Attributes:
        perplexity: ``exp(loss)``.
        loss: Nats per predicted token.
        num_tokens: Number of predicted tokens (all but the first of each window).
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
    model: PreTrainedModel, windows: Tensor, *, depth: int | None = None, progress: Progress = silent
) -> Perplexity:
    """Perplexity of ``model`` over token windows ``[N, T]``, with logits cast to float32.

    With a ``depth``, every token exits after that recursion.
    """
    loss = 0.0
    for batch in _batches(windows, progress):
        loss += _negative_log_likelihood(_log_probabilities(model, batch, depth), batch)
    return _perplexity(loss, windows)


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    control: PreTrainedModel,
    windows: Tensor,
    *,
    depth: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models over token windows ``[N, T]``; with a ``depth``, every token of ``model`` exits there.

    Raises:
        CheckpointError: The vocabularies differ, so predictions cannot be compared token by token.
    """
    if model.config.vocab_size != control.config.vocab_size:
        raise CheckpointError(
            f"The model has a vocabulary of {model.config.vocab_size} tokens and the control one of "
            f"{control.config.vocab_size}: their predictions cannot be compared. Use a control with the same tokenizer."
        )
    model_loss = control_loss = num_agreeing = divergence = 0.0
    for batch in _batches(windows, progress):
        logprobs, control_logprobs = _log_probabilities(model, batch, depth), _log_probabilities(control, batch)
        model_loss += _negative_log_likelihood(logprobs, batch)
        control_loss += _negative_log_likelihood(control_logprobs, batch)
        num_agreeing += float((logprobs.argmax(-1) == control_logprobs.argmax(-1)).sum())
        divergence += float(F.kl_div(logprobs, control_logprobs, log_target=True, reduction="sum"))
    figures, control_figures = _perplexity(model_loss, windows), _perplexity(control_loss, windows)
    count = figures.num_tokens
    return Comparison(figures, control_figures, num_agreeing / count, divergence / count)


def _log_probabilities(model: PreTrainedModel, batch: Tensor, depth: int | None = None) -> Tensor:
    """``[b, T] -> [b · (T-1), V]`` on the CPU, float32."""
    exit_depth = {} if depth is None else {"exit_depth": depth}
    logits = model(batch.to(model.device), use_cache=False, **exit_depth).logits
    return logits[:, :-1].float().cpu().flatten(0, 1).log_softmax(-1)


def _negative_log_likelihood(log_probabilities: Tensor, batch: Tensor) -> float:
    return -float(log_probabilities.gather(-1, batch[:, 1:].reshape(-1, 1)).double().sum())


def _perplexity(total: float, windows: Tensor) -> Perplexity:
    count = windows[:, 1:].numel()
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count)


def _batches(windows: Tensor, progress: Progress) -> Iterator[Tensor]:
    batches = windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
    for done, batch in enumerate(batches, start=1):
        yield batch
        progress("measure", done, len(batches))
