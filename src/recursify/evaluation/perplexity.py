"""Perplexity, and how near one model's predictions are to another's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from recursify.errors import CheckpointError

TOKENS_PER_BATCH = 2048
"""Two sets of float32 logits over 49 152 words of this many tokens are 0.8 GB."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood on a text.

    Attributes:
        perplexity: ``exp(loss)``.
        loss: Nats per predicted token.
        num_tokens: Tokens predicted (the first of each window is not).
    """

    perplexity: float
    loss: float
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A model beside its control on the same tokens.

    Attributes:
        model: Perplexity of the model.
        control: Perplexity of the control.
        top1_agreement: Fraction of tokens on which both put the same token first.
        kl: Mean ``KL(control ‖ model)``, nats per token.
    """

    model: Perplexity
    control: Perplexity
    top1_agreement: float
    kl: float

    def as_evaluation(self, text: str) -> dict[str, Any]:
        """As an entry of ``evaluation`` in ``recursify.json``, measured on the text of that name."""
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: PreTrainedModel,
    windows: Tensor,
    control: PreTrainedModel | None = None,
    *,
    depth: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Perplexity | Comparison:
    """:func:`perplexity`, or :func:`compare` where there is a control."""
    if control is None:
        return perplexity(model, windows, depth=depth, progress=progress)
    return compare(model, control, windows, depth=depth, progress=progress)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    depth: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Perplexity:
    """Perplexity of ``model`` over token windows ``[N, T]``, logits taken in float32.

    With a ``depth``, every token exits after that recursion.
    """
    total, count = 0.0, 0
    batches = _batches(windows)
    for done, batch in enumerate(batches):
        total -= float(_chosen(_log_probabilities(model, batch, depth), batch).double().sum())
        count += batch[:, 1:].numel()
        progress("measure", done + 1, len(batches))
    return _perplexity(total, count)


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    control: PreTrainedModel,
    windows: Tensor,
    *,
    depth: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Comparison:
    """Run both models over token windows ``[N, T]``; with a ``depth``, every token of ``model`` exits there.

    Raises:
        CheckpointError: Their vocabularies differ, so that their predictions are not about the same tokens.
    """
    if model.config.vocab_size != control.config.vocab_size:
        raise CheckpointError(
            f"The model has {model.config.vocab_size} tokens in its vocabulary and the control "
            f"{control.config.vocab_size}: their predictions cannot be compared token by token."
        )
    mine_total = theirs_total = agreed = divergence = 0.0
    count = 0
    batches = _batches(windows)
    for done, batch in enumerate(batches):
        mine, theirs = _log_probabilities(model, batch, depth), _log_probabilities(control, batch)
        mine_total -= float(_chosen(mine, batch).double().sum())
        theirs_total -= float(_chosen(theirs, batch).double().sum())
        agreed += float((mine.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += float(F.kl_div(mine, theirs, log_target=True, reduction="sum"))
        count += batch[:, 1:].numel()
        progress("measure", done + 1, len(batches))
    return Comparison(
        _perplexity(mine_total, count), _perplexity(theirs_total, count), agreed / count, divergence / count
    )


def _log_probabilities(model: PreTrainedModel, batch: Tensor, depth: int | None = None) -> Tensor:
    """``[b, T] -> [b · (T-1), V]`` on the CPU, float32."""
    ids = batch.to(model.device)
    exit_depth = {} if depth is None else {"exit_depth": depth}
    logits = model(ids, use_cache=False, **exit_depth).logits
    logits = logits[:, :-1].float().cpu()
    return logits.flatten(0, 1).log_softmax(-1)


def _chosen(log_probabilities: Tensor, batch: Tensor) -> Tensor:
    return log_probabilities.gather(-1, batch[:, 1:].reshape(-1, 1))


def _perplexity(total: float, count: int) -> Perplexity:
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count)


def _batches(windows: Tensor) -> tuple[Tensor, ...]:
    return windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
