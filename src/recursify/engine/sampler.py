"""Sampling: every request with its own parameters and its own generator, independently of the batch.

Shape legend: n tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recursify.modeling.recursive_columns import on_device

from .request import Request


@dataclass(frozen=True)
class SampledToken:
    """A sampled token, whose id may still be on the device.

    Attributes:
        request: Request of the token.
        depth: Depth after which the token that produced it exited.
        log_p: Log-probabilities by token id, if requested.
    """

    request: Request
    depth: int
    log_p: dict[int, float] | None


def sample(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Sample one token ``[n]`` per row of ``logits [n, V]``."""
    greedy = logits.argmax(-1)
    rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if not rows:
        return greedy
    index = on_device(rows, logits.device, torch.long)
    params = [requests[row].params for row in rows]
    # Random numbers come from the request's own generator on the host, so they are the same for any device.
    numbers = [
        (entry.temperature, entry.top_p, entry.min_p, requests[row].use_draw())
        for row, entry in zip(rows, params, strict=True)
    ]
    temperatures, top_p, min_p, draws = on_device(numbers, logits.device, torch.float64).unbind(-1)
    top_k = on_device([entry.top_k for entry in params], logits.device, torch.long)
    tokens = choose(
        logits[index],
        temperatures,
        top_k if any(entry.top_k for entry in params) else None,
        top_p if any(entry.top_p < 1 for entry in params) else None,
        min_p if any(entry.min_p for entry in params) else None,
        draws,
    )
    return greedy.index_put((index,), tokens)


def choose(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    draws: Tensor,
) -> Tensor:
    """Select the token ``[n]`` of each row by inverse transform sampling, without a sync.

    The tokens divide the range from 0 to 1 in descending order of their probabilities.

    Args:
        logits: Logits ``[n, V]``.
        temperatures: Temperatures ``[n]``.
        top_k: Number of tokens to keep ``[n]``, 0 for all; None if no row limits it.
        top_p: Probability mass to keep ``[n]``, 1 for all; None if no row limits it.
        min_p: Least probability relative to the largest ``[n]``, 0 for all; None if no row limits it.
        draws: Random numbers ``[n]`` in [0, 1).
    """
    shifted = logits.double()
    shifted = shifted - shifted.amax(-1, keepdim=True)  # a tiny temperature would make them infinite
    scaled = shifted / temperatures[:, None].double().clamp(min=1e-6)
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        probabilities = probabilities.masked_fill((ranks >= top_k[:, None]) & (top_k[:, None] > 0), 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        mass_before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((mass_before >= top_p[:, None]) & (top_p[:, None] < 1), 0.0)
    if min_p is not None:
        least = min_p[:, None] * probabilities[:, :1]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(-1)
    rank = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    return order.gather(-1, rank.clamp(max=logits.shape[-1] - 1))[:, 0]


def log_probabilities(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[dict[int, float]]:
    """Log-probabilities of the ``counts`` most likely tokens and of ``tokens [n]``, per row of ``logits [n, V]``."""
    log_p = logits.float().log_softmax(-1)
    best = log_p.topk(max(1, *counts), dim=-1)
    sampled = log_p.gather(-1, tokens[:, None])
    all_values = torch.cat([best.values, sampled], dim=-1).tolist()
    all_ids = torch.cat([best.indices, tokens[:, None]], dim=-1).tolist()
    return [
        dict([*list(zip(ids, values, strict=True))[:count], (ids[-1], values[-1])])
        for ids, values, count in zip(all_ids, all_values, counts, strict=True)
    ]
