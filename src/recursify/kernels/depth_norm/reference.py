"""Residual and RMS norm with a weight per depth, in plain PyTorch.

Shape legend: N rows, H hidden size, R depths.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_and_norm(
    states: Tensor, residual: Tensor | None, weight: Tensor, depth: Tensor, eps: float, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """``s = states + residual`` and ``s / rms(s) · weight[depth]``, both ``[N, H]``.

    The norm is that of the sum as stored, computed in float32 and rounded once.
    """
    total = states if residual is None else states + residual
    exact = total.float()
    scale = weight[depth.long()].float() + (1 if adds_one else 0)
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * scale
    return total, normed.to(states.dtype)
