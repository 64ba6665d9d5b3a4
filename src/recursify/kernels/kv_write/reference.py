"""KV-cache write in plain PyTorch.

Shape legend: N rows, K key heads, D head size, P pages, S page size, R depths.
"""

from __future__ import annotations

from torch import Tensor


def store(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor,
    slots: Tensor, depth: Tensor, page_offsets: Tensor,
) -> None:  # fmt: skip
    """Write ``[N, K, D]`` to pages ``[P, S, K, D]`` at ``slots + page_offsets[depth] · S``; skip negative slots."""
    rows = slots >= 0
    targets = slots[rows].long() + page_offsets.long()[depth[rows].long()] * key_pages.shape[1]
    for new, pages in ((key, key_pages), (value, value_pages)):
        pages.flatten(0, 1)[targets] = new[rows].to(pages.dtype)
