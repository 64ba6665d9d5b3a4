"""Rotating keys and writing them with their values into pages, in plain PyTorch.

Shape legend: N rows, K key heads, D head size, E rotated part of it, P pages, S page size, R depths.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``key [N, K, D]`` with its first ``E`` columns rotated by ``cos`` and ``sin [N, E]``, in float32, rounded once.

    Column ``i`` of the first half is turned against ``i + E/2``.
    """
    size = cos.shape[-1]
    turning = key[..., :size].float()
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None].float() + torch.cat((-second, first), dim=-1) * sin[:, None].float()
    return torch.cat((turned.to(key.dtype), key[..., size:]), dim=-1)


def store(new: Tensor, pages: Tensor, slots: Tensor, depth: Tensor, count: Tensor, page_offsets: Tensor) -> None:
    """Put ``new [N, K, D]`` into ``pages [P, S, K, D]`` at every depth of ``depth .. depth + count - 1``.

    A row whose slot is negative is left out, and so are depths that are not there.
    """
    page_size, num_depths = pages.shape[1], len(page_offsets)
    flat = pages.view(-1, *pages.shape[2:])
    for level in range(num_depths):
        goes = (slots >= 0) & (depth <= level) & (level < depth + count)
        flat[slots[goes].long() + page_offsets[level].long() * page_size] = new[goes].to(pages.dtype)
