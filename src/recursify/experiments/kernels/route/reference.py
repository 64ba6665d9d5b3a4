"""Gather with a norm and gated scatter of a routed recursion, in plain PyTorch.

Shape legend: T rows, N selected rows, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_normed(states: Tensor, rows: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``g = states[rows]`` and ``g / rms(g) · weight``, both ``[N, H]``; the norm in float32, rounded once.

    Both are 0 for a negative row number.
    """
    is_row = (rows >= 0)[:, None]
    gathered = states[rows.long().clamp(min=0)].masked_fill(~is_row, 0)
    exact = gathered.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    return gathered, normed.to(states.dtype)


def scatter_gated(states: Tensor, made: Tensor, gate: Tensor, rows: Tensor, kind: str) -> Tensor:
    """Write :func:`gated` outputs to ``states[rows]``; skip negative row numbers."""
    is_row = rows >= 0
    rows, made, gate = rows[is_row].long(), made[is_row], gate[is_row]
    states[rows] = gated(states[rows], made, gate, kind)
    return states


def gated(entered: Tensor, made: Tensor, gate: Tensor, kind: str) -> Tensor:
    """``made + gate · (made − entered)`` for ``residual``, ``entered + gate · made`` for ``mor``; rounded once."""
    before, after, scale = entered.float(), made.float(), gate.float()[:, None]
    out = after + scale * (after - before) if kind == "residual" else before + scale * after
    return out.to(entered.dtype)
