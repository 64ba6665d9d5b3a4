"""Perplexity, and how near one model's predictions are to another's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

TOKENS_PER_BATCH = 4096


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def merged(self, others: list[Comparison]) -> Comparison:
        """This and ``others`` over all their tokens together."""
        parts = [self, *others]
        counts = [part.model.num_tokens for part in parts]
        total = sum(counts)

        def mean(values: list[float]) -> float:
            return sum(value * count for value, count in zip(values, counts, strict=True)) / total

        return Comparison(
            _perplexity(mean([part.model.loss for part in parts]) * total, total),
            _perplexity(mean([part.control.loss for part in parts]) * total, total),
            mean([part.top1_agreement for part in parts]),
            mean([part.kl for part in parts]),
        )


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor) -> Perplexity:
    """Perplexity of ``model`` over token windows ``[N, T]``, logits taken in float32."""
    total, count = 0.0, 0
    for batch in _batches(windows):
        batch = batch.to(model.device)
        logits = model(batch).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return _perplexity(total, count)


@torch.inference_mode()
def compare(model: PreTrainedModel, control: PreTrainedModel, windows: Tensor) -> Comparison:
    """Run both models over token windows ``[N, T]``."""
    totals = torch.zeros(4, dtype=torch.float64)
    count = 0
    for batch in _batches(windows):
        targets = batch[:, 1:].flatten()
        mine = model(batch.to(model.device)).logits[:, :-1].float().flatten(0, 1).log_softmax(-1).cpu()
        theirs = control(batch.to(control.device)).logits[:, :-1].float().flatten(0, 1).log_softmax(-1).cpu()
        rows = torch.arange(len(targets))
        totals[0] -= float(mine[rows, targets].double().sum())
        totals[1] -= float(theirs[rows, targets].double().sum())
        totals[2] += float((mine.argmax(-1) == theirs.argmax(-1)).sum())
        totals[3] += float(F.kl_div(mine, theirs, log_target=True, reduction="sum"))
        count += len(targets)
    mine_total, theirs_total, agreed, divergence = totals.tolist()
    return Comparison(
        _perplexity(mine_total, count), _perplexity(theirs_total, count), agreed / count, divergence / count
    )


def _perplexity(total: float, count: int) -> Perplexity:
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count)


def _batches(windows: Tensor):
    return windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
