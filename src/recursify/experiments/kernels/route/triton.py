"""Gather and scatter of a routed recursion in one launch each, with one program per selected row.

Shape legend: T rows, N selected rows, H hidden size. Locals: ``i_`` program, ``o_`` offsets, ``m_`` mask, ``b_``
values; ``B*`` tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.triton_math import tile_of


@triton.jit
def gather_rows(states, rows, weight, taken, normed, H, eps, stride_states, BH: tl.constexpr):
    """Program ``i_n``. Writes ``taken`` and ``normed``, each ``[N, H]``."""
    i_n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i_n).to(tl.int64)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    m_row = o_h < tl.where(row >= 0, H, 0)
    b_states = tl.load(states + row * stride_states + o_h, mask=m_row, other=0.0)
    tl.store(taken + i_n * H + o_h, b_states, mask=m_h)
    exact = b_states.to(tl.float32)
    b_normed = exact * tl.rsqrt(tl.sum(exact * exact, axis=0) / H + eps)
    if weight is not None:
        b_normed *= tl.load(weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(normed + i_n * H + o_h, b_normed.to(b_states.dtype), mask=m_h)


@triton.jit
def scatter_rows(states, made, gate, rows, H, stride_states, stride_made, RESIDUAL: tl.constexpr, BH: tl.constexpr):
    """Program ``i_n``."""
    i_n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i_n).to(tl.int64)
    if row < 0:
        return
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    p_states = states + row * stride_states + o_h
    b_made = tl.load(made + i_n * stride_made + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_states = tl.load(p_states, mask=m_h, other=0.0)
    scale = tl.load(gate + i_n).to(tl.float32)
    before = b_states.to(tl.float32)
    out = b_made + scale * (b_made - before) if RESIDUAL else before + scale * b_made
    tl.store(p_states, out.to(b_states.dtype), mask=m_h)


def gather_normed(states: Tensor, rows: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Launch; :func:`recursify.experiments.kernels.route.gather_normed` has checked the arguments."""
    count, size = len(rows), states.shape[1]
    states = states if states.stride(1) == 1 else states.contiguous()
    weight = None if weight is None else weight.contiguous()
    taken = torch.empty(count, size, dtype=states.dtype, device=states.device)
    normed = torch.empty(count, size, dtype=states.dtype, device=states.device)
    if count:
        tile = tile_of(size)
        gather_rows[(count,)](
            states, rows, weight, taken, normed, size, eps, states.stride(0), BH=tile, num_warps=_warps(tile)
        )  # fmt: skip
    return taken, normed


def scatter_gated(states: Tensor, made: Tensor, gate: Tensor, rows: Tensor, kind: str) -> Tensor:
    """Launch; :func:`recursify.experiments.kernels.route.scatter_gated` has checked the arguments."""
    made = made if made.stride(1) == 1 else made.contiguous()
    if len(rows):
        tile = tile_of(states.shape[1])
        scatter_rows[(len(rows),)](
            states, made, gate, rows, states.shape[1], states.stride(0), made.stride(0),
            RESIDUAL=kind == "residual", BH=tile, num_warps=_warps(tile),
        )  # fmt: skip
    return states


def _warps(tile: int) -> int:
    return max(1, min(16, tile // 512))
