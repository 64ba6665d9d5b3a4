"""KV-cache write in plain PyTorch.

Shape legend: N rows, K key heads, D head size, P pages, S page size, R depths.
"""

from __future__ import annotations

from torch import Tensor


def store(new: Tensor, pages: Tensor, slots: Tensor, depth: Tensor, page_offsets: Tensor) -> None:
    """Write ``new [N, K, D]`` to ``pages [P, S, K, D]`` at ``slots + page_offsets[depth] · S``; skip negative slots."""
    rows = slots >= 0
    offsets = page_offsets.long()[depth[rows].long()] * pages.shape[1]
    pages.flatten(0, 1)[slots[rows].long() + offsets] = new[rows].to(pages.dtype)
