"""Depth-paged attention in plain PyTorch, which gathers the keys of every row.

Shape legend: N rows, K key heads, G query heads per key head, L slots per row, D head size, P pages, S page size,
R depths.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend_pages(
    query: Tensor, key_pages: Tensor, value_pages: Tensor,
    block_table: Tensor, depth: Tensor, page_offsets: Tensor, lengths: Tensor,
    scale: float, window: int | Tensor | None, softcap: float | None,
    key_positions: Tensor | None, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    """Products are in the dtype of the inputs, the softmax in float32."""
    slots, is_key = _slots(block_table, depth, page_offsets, lengths, key_pages.shape[1])
    visible = _visible(slots, is_key, lengths, window, key_positions, positions)
    heads = key_pages.shape[2]
    keys, values = (pages.flatten(0, 1)[slots] for pages in (key_pages, value_pages))  # [N, L, K, D]
    scores = torch.einsum("nkgd,nlkd->nkgl", query.unflatten(1, (heads, -1)), keys).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible[:, None, None]
    weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).masked_fill(hidden, 0)
    # Slots that a row does not see may contain NaN, and NaN times 0 is NaN.
    values = values.masked_fill(~visible[:, :, None, None], 0)
    return torch.einsum("nkgl,nlkd->nkgd", weights.to(values.dtype), values).flatten(1, 2)


def _slots(
    block_table: Tensor, depth: Tensor, page_offsets: Tensor, lengths: Tensor, page_size: int
) -> tuple[Tensor, Tensor]:
    """Slot of every key in flattened pages, ``[N, L]``, and a mask of the keys within the row's length, ``[N, L]``.

    Key ``t`` of row ``n`` is in page ``block_table[n, t // S] + page_offsets[depth[n]]`` at index ``t % S``.
    """
    keys = torch.arange(block_table.shape[1] * page_size, device=block_table.device)
    is_key = keys < lengths[:, None]
    pages = block_table.long()[:, keys // page_size] + page_offsets.long()[depth.long()][:, None]
    return (pages * page_size + keys % page_size).masked_fill(~is_key, 0), is_key


def _visible(
    slots: Tensor,
    is_key: Tensor,
    lengths: Tensor,
    window: int | Tensor | None,
    key_positions: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """Mask ``[N, L]`` of the keys in ``slots [N, L]`` that are less than ``window`` positions before their row."""
    if window is None:
        return is_key
    width = window[:, None] if isinstance(window, Tensor) else window
    if key_positions is None or positions is None:
        of_keys, of_rows = torch.arange(slots.shape[1], device=slots.device), lengths - 1
    else:
        of_keys, of_rows = key_positions.flatten()[slots], positions
    return is_key & ((of_keys > of_rows[:, None] - width) | (width <= 0))
