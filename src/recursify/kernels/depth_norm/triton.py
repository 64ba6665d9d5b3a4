"""Residual and RMS norm in one launch, with one program per row.

Shape legend: N rows, H hidden size, R depths. Locals: ``i_`` program, ``o_`` offsets, ``m_`` mask, ``b_`` values;
``B*`` tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.triton_math import tile_of


@triton.jit
def add_norm_rows(
    states, residual, weight, depth, total, normed, H, eps, stride_states, stride_residual, stride_weight,
    ADDS_ONE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Program ``i_n``. Writes ``normed [N, H]``, and ``total [N, H]`` if there is a residual."""
    i_n = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    b_states = tl.load(states + i_n * stride_states + o_h, mask=m_h, other=0.0)
    exact = b_states.to(tl.float32)
    if residual is not None:
        exact += tl.load(residual + i_n * stride_residual + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_total = exact.to(b_states.dtype)
        tl.store(total + i_n * H + o_h, b_total, mask=m_h)
        exact = b_total.to(tl.float32)
    at = tl.load(depth + i_n).to(tl.int64)
    scale = tl.load(weight + at * stride_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
    if ADDS_ONE:
        scale += 1
    b_normed = exact * tl.rsqrt(tl.sum(exact * exact, axis=0) / H + eps) * scale
    tl.store(normed + i_n * H + o_h, b_normed.to(b_states.dtype), mask=m_h)


def add_and_norm(
    states: Tensor, residual: Tensor | None, weight: Tensor, depth: Tensor, eps: float, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """Launch; :func:`recursify.kernels.depth_norm.add_and_norm` has checked the arguments."""
    rows, size = states.shape
    states, weight = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (states, weight))
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    normed = torch.empty(rows, size, dtype=states.dtype, device=states.device)
    total = states if residual is None else torch.empty(rows, size, dtype=states.dtype, device=states.device)
    if not rows:
        return total, normed
    tile = tile_of(size)
    add_norm_rows[(rows,)](
        states, residual, weight, depth, total, normed, size, eps,
        states.stride(0), 0 if residual is None else residual.stride(0), weight.stride(0),
        ADDS_ONE=adds_one, BH=tile, num_warps=max(1, min(16, tile // 512)),
    )  # fmt: skip
    return total, normed
