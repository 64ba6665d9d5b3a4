"""Taking rows out, normed, and putting what was made of them back, gated, in plain PyTorch.

Shape legend: T rows of all, N taken rows, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_normed(states: Tensor, rows: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``g = states[rows]`` and ``g / rms(g) · weight``, both ``[N, H]``; the norm in float32, rounded once.

    Where a row is negative, both are 0.
    """
    there = (rows >= 0)[:, None]
    taken = states[rows.long().clamp(min=0)].masked_fill(~there, 0)
    exact = taken.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    return taken, normed.to(states.dtype)


def scatter_gated(states: Tensor, made: Tensor, gate: Tensor, rows: Tensor, kind: str) -> Tensor:
    """Put into ``states[rows]`` what :func:`gated` makes of it; negative rows are left out."""
    there = rows >= 0
    rows, made, gate = rows[there].long(), made[there], gate[there]
    states[rows] = gated(states[rows], made, gate, kind)
    return states


def gated(entered: Tensor, made: Tensor, gate: Tensor, kind: str) -> Tensor:
    """``made + gate · (made − entered)`` for ``residual``, ``entered + gate · made`` for ``mor``; rounded once."""
    before, after, scale = entered.float(), made.float(), gate.float()[:, None]
    out = after + scale * (after - before) if kind == "residual" else before + scale * after
    return out.to(entered.dtype)
