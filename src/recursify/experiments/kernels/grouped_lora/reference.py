"""Low-rank residuals by depth, in plain PyTorch: three forms of one sum.

All take ``y [N, O]``, ``x [N, I]``, ``a [R, r, I]``, ``b [R, O, r]`` and ``depth [N]``, add ``(x a[depth]ᵀ) b[depth]ᵀ``
to ``y`` and return it. A row with a negative depth does not change.

Shape legend: N rows, I and O features, r rank, R depths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 16
"""Number of rows up to which one product over all depths is faster than one per depth. On a CPU core with 576 features
and 3 depths, 8 rows of rank 16 take 112 µs instead of 144; 256 rows of rank 64 take 2900 µs instead of 2200."""


def add_depth_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """Add with the faster form: on a CPU it depends on the number of rows; elsewhere slices would sync."""
    if x.device.type != "cpu" or len(x) <= FEW_ROWS:
        return by_masked_concatenation(y, x, a, b, depth)
    return by_slices(y, x, a, b, depth)


def by_slices(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """Add depth by depth."""
    for level in range(len(a)):
        rows = (depth == level).nonzero()[:, 0]
        if len(rows):
            y.index_add_(0, rows, F.linear(F.linear(x[rows], a[level]), b[level]).to(y.dtype))
    return y


def by_masked_concatenation(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """Multiply all rows by the ``a`` of all depths, mask the depths that are not a row's own, multiply by all ``b``.

    Shapes do not depend on depths, so CUDA graphs can capture it; mixed rows read all factors anyway.
    """
    ranks = torch.arange(len(a), device=x.device).repeat_interleave(a.shape[1])
    inner = F.linear(x, a.flatten(0, 1)).masked_fill(ranks != depth[:, None], 0)
    return y.add_(F.linear(inner, b.transpose(1, 2).flatten(0, 1).T))


def by_grouped_products(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """Sort rows by depth and use PyTorch's grouped products, which need bfloat16 on a GPU."""
    order = depth.sort(stable=True).indices
    # Rows with a negative depth come first and belong to no group.
    counts = torch.bincount(depth.long() + 1, minlength=len(a) + 1)
    order = order[int(counts[0]) :]
    ends = counts[1:].cumsum(0).int()
    if not len(order):
        return y
    inner = F.grouped_mm(x[order], a.transpose(1, 2), offs=ends)
    return y.index_add_(0, order, F.grouped_mm(inner, b.transpose(1, 2), offs=ends).to(y.dtype))
