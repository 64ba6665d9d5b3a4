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
    temperatures = on_device([each.temperature for each in params], logits.device, torch.float32)
    # Drawn where the request's generator is, so that a draw is the same on any device.
    draws = torch.cat([torch.rand(1, generator=requests[row].generator, dtype=torch.float64) for row in rows])
    shifted = logits[index].double()
    shifted = shifted - shifted.amax(-1, keepdim=True)  # or a tiny temperature makes them infinite
    scaled = shifted / temperatures[:, None].double().clamp(min=1e-6)
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if any(each.top_k for each in params):
        vocabulary = logits.shape[-1]
        ranks = on_device([each.top_k or vocabulary for each in params], logits.device, torch.long)
        probabilities = probabilities.masked_fill(torch.arange(vocabulary, device=logits.device) >= ranks[:, None], 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    if any(each.top_p < 1 for each in params):
        top_p = on_device([each.top_p for each in params], logits.device, torch.float64)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p[:, None], 0.0)
    cumulated = probabilities.cumsum(-1)
    threshold = draws.to(logits.device)[:, None] * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return greedy.index_put((index,), order.gather(-1, place)[:, 0])


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
