"""Attention over pages with a depth per row, in plain PyTorch: every row's keys are gathered.

Shape legend: N rows, K key heads, G query heads per key head, L slots in a row's table, D head size, P pages, S page
size, R depths.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``softmax(cap(q kᵀ · scale) | visible) v`` of ``query [N, K·G, D]`` over ``slots [N, L]``.

    A row that sees no key is 0. Products are in the dtype of the inputs, the softmax in float32.
    """
    heads = key_pages.shape[2]
    keys, values = (pages.flatten(0, 1)[slots] for pages in (key_pages, value_pages))  # [N, L, K, D]
    scores = torch.einsum("nkgd,nlkd->nkgl", query.unflatten(1, (heads, -1)), keys).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible[:, None, None]
    weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).masked_fill(hidden, 0)
    # What lies in slots that a row does not see is anything, and NaN times 0 is NaN.
    values = values.masked_fill(~visible[:, :, None, None], 0)
    return torch.einsum("nkgl,nlkd->nkgd", weights.to(values.dtype), values).flatten(1, 2)


def slots_of(
    block_table: Tensor,
    depth: Tensor,
    page_offsets: Tensor,
    lengths: Tensor,
    page_size: int,
    exit_depths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Where each row's keys lie in flattened pages, ``[N, L]``, and which of those are there, bool ``[N, L]``.

    Key ``t`` lies in page ``block_table[n, t // S] + page_offsets[d]`` at ``t % S``, where ``d`` is the row's depth; or
    the key's own deepest, ``exit_depths[block_table[n, t // S], t % S]``, if that is less.
    """
    keys = torch.arange(block_table.shape[1] * page_size, device=block_table.device)
    there = keys < lengths[:, None]
    block = block_table.long()[:, keys // page_size].masked_fill(~there, 0)
    within = keys % page_size
    deepest = depth.long()[:, None].expand_as(block)
    if exit_depths is not None:
        deepest = deepest.minimum(exit_depths[block, within].long())
    # Slots that are not there may hold any depth.
    deepest = deepest.masked_fill(~there, 0)
    slots = (block + page_offsets.long()[deepest]) * page_size + within
    return slots.masked_fill(~there, 0), there


def visible_in(
    slots: Tensor,
    there: Tensor,
    lengths: Tensor,
    window: int | Tensor | None,
    key_positions: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """Which of ``slots [N, L]`` are less than ``window`` positions behind their row, bool ``[N, L]``."""
    if window is None:
        return there
    width = window[:, None] if isinstance(window, Tensor) else window
    if key_positions is None or positions is None:
        place, own = torch.arange(slots.shape[1], device=slots.device), lengths - 1
    else:
        place, own = key_positions.flatten()[slots], positions
    return there & ((place > own[:, None] - width) | (width <= 0))
