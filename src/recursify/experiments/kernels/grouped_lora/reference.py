"""Low-rank residuals by depth, in plain PyTorch: three forms of one sum.

All take ``y [N, O]``, ``x [N, I]``, ``a [R, r, I]``, ``b [R, O, r]`` and ``depth [N]``, and add to ``y``, which they
return, ``(x a[depth]ᵀ) b[depth]ᵀ``. A row whose depth is negative is left as it is.

Shape legend: N rows, I and O features, r rank, R depths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 16
"""Up to so many rows one product over all depths beats one per depth: on a CPU core, 576 features, 3 depths of rank 16
and 8 rows take 112 µs against 144; 256 rows of rank 64 take 2900 µs against 2200."""


def add_depth_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """By the form that suits: on a CPU that depends on the rows, elsewhere slices would wait for the device."""
    if x.device.type != "cpu" or len(x) <= FEW_ROWS:
        return by_masked_concatenation(y, x, a, b, depth)
    return by_slices(y, x, a, b, depth)


def by_slices(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """The rows of each depth by themselves."""
    for level in range(len(a)):
        rows = (depth == level).nonzero()[:, 0]
        if len(rows):
            y.index_add_(0, rows, F.linear(F.linear(x[rows], a[level]), b[level]).to(y.dtype))
    return y


def by_masked_concatenation(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """All rows through all depths' ``a`` side by side, what is not of a row's depth set to 0, and through all ``b``.

    Shapes do not depend on depths, so it can be captured in a CUDA graph; mixed rows read all factors anyway.
    """
    ranks = torch.arange(len(a), device=x.device).repeat_interleave(a.shape[1])
    inner = F.linear(x, a.flatten(0, 1)).masked_fill(ranks != depth[:, None], 0)
    return y.add_(F.linear(inner, b.transpose(1, 2).flatten(0, 1).T))


def by_grouped_products(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """Rows sorted by depth, and PyTorch's grouped products, which on a GPU are of bfloat16."""
    order = depth.sort(stable=True).indices
    # Rows of no depth come first, and have no group.
    counts = torch.bincount(depth.long() + 1, minlength=len(a) + 1)
    order = order[int(counts[0]) :]
    ends = counts[1:].cumsum(0).int()
    if not len(order):
        return y
    inner = F.grouped_mm(x[order], a.transpose(1, 2), offs=ends)
    return y.index_add_(0, order, F.grouped_mm(inner, b.transpose(1, 2), offs=ends).to(y.dtype))
