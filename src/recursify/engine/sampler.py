"""Choosing tokens: every request by its own settings and its own generator, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling.recursive_decoding import on_device

from .request import Request


def sample(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """One token per row of ``logits [n, V]``: ``[n]``."""
    greedy = logits.argmax(-1)
    rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
    if not rows:
        return greedy
    index = on_device(rows, logits.device, torch.long)
    params = [requests[row].params for row in rows]
    # Drawn where the request's generator is, so that a draw is the same on any device.
    temperatures, top_p, draws = on_device(
        [
            [each.temperature for each in params],
            [each.top_p for each in params],
            [requests[row].use_draw() for row in rows],
        ],
        logits.device,
        torch.float64,
    )
    top_k = None
    if any(each.top_k for each in params):
        top_k = on_device([each.top_k or 0 for each in params], logits.device, torch.long)
    if all(each.top_p == 1 for each in params):
        top_p = None
    return greedy.index_put((index,), choose(logits[index], temperatures, top_k, top_p, draws))


def choose(logits: Tensor, temperatures: Tensor, top_k: Tensor | None, top_p: Tensor | None, draws: Tensor) -> Tensor:
    """The token of each row of ``logits [n, V]`` that its draw falls to, ``[n]``.

    Tokens in the order of their probability take up the range from 0 to 1. Nothing here waits for the device.

    Args:
        logits: As the model makes them.
        temperatures: ``[n]``.
        top_k: ``[n]``, 0 for all; None where no row has any.
        top_p: ``[n]``, 1 for all; likewise.
        draws: ``[n]``, from 0 to 1.
    """
    shifted = logits.double()
    shifted = shifted - shifted.amax(-1, keepdim=True)  # or a tiny temperature makes them infinite
    scaled = shifted / temperatures[:, None].double().clamp(min=1e-6)
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        probabilities = probabilities.masked_fill((ranks >= top_k[:, None]) & (top_k[:, None] > 0), 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), 0.0)
    cumulated = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulated, draws[:, None] * cumulated[:, -1:], right=True)
    return order.gather(-1, place.clamp(max=logits.shape[-1] - 1))[:, 0]


def log_probabilities(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[dict[int, float]]:
    """Per row of ``logits [n, V]``, those of the first choices, as many as ``counts`` has, and of ``tokens [n]``."""
    log_p = logits.float().log_softmax(-1)
    best = log_p.topk(max(1, *counts), dim=-1)
    chosen = log_p.gather(-1, tokens[:, None])
    numbers = torch.cat([best.values, chosen], dim=-1).tolist()
    ids = torch.cat([best.indices, tokens[:, None]], dim=-1).tolist()
    return [
        dict([*list(zip(its_ids, values, strict=True))[:count], (its_ids[-1], values[-1])])
        for its_ids, values, count in zip(ids, numbers, counts, strict=True)
    ]
