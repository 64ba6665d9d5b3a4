"""Low-rank residuals by depth in one launch, with one program per tile of rows and outputs.

Each program computes ``x a[d]ᵀ`` of its rows: it is small, and its inputs are in the L2 cache after the first program.

Shape legend: N rows, IN and OUT features, Q rank, R depths. Locals: ``i_`` program, ``o_`` offsets, ``m_`` mask,
``b_`` values; ``B*`` tile sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.triton_math import tile_of


@triton.jit
def add_residuals(
    y, x, a, b, depth, N, IN, OUT, stride_x,
    Q: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Program ``(i_o, i_n)``."""
    i_o, i_n = tl.program_id(0), tl.program_id(1)
    o_n, o_i = i_n * BN + tl.arange(0, BN), tl.arange(0, BI)
    o_o, o_q = i_o * BO + tl.arange(0, BO), tl.arange(0, BQ)
    m_n, m_o, m_q = o_n < N, o_o < OUT, o_q < Q
    o_y = o_n.to(tl.int64)[:, None] * OUT + o_o[None, :]
    m_y = m_n[:, None] & m_o[None, :]
    b_depth = tl.load(depth + o_n, mask=m_n, other=-1).to(tl.int32)
    p_x = x + o_n.to(tl.int64)[:, None] * stride_x
    added = tl.zeros((BN, BO), tl.float32)
    for level in range(R):
        m_level = b_depth == level
        if tl.max(m_level.to(tl.int32), axis=0) > 0:
            inner = tl.zeros((BN, BQ), tl.float32)
            p_a = a + (level * Q + o_q).to(tl.int64)[None, :] * IN
            for k in range(0, IN, BI):
                m_i = k + o_i < IN
                b_x = tl.load(p_x + (k + o_i)[None, :], mask=m_level[:, None] & m_i[None, :], other=0.0)
                b_a = tl.load(p_a + (k + o_i)[:, None], mask=m_q[None, :] & m_i[:, None], other=0.0)
                inner = tl.dot(b_x, b_a, inner, input_precision="ieee")
            p_b = b + (level * OUT + o_o).to(tl.int64)[None, :] * Q
            b_b = tl.load(p_b + o_q[:, None], mask=m_o[None, :] & m_q[:, None], other=0.0)
            added = tl.dot(inner.to(b_b.dtype), b_b, added, input_precision="ieee")
    b_y = tl.load(y + o_y, mask=m_y, other=0.0)
    tl.store(y + o_y, (b_y.to(tl.float32) + added).to(b_y.dtype), mask=m_y)


def add_depth_lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor) -> Tensor:
    """Launch; :func:`recursify.experiments.kernels.grouped_lora.add_depth_lora` has checked the arguments."""
    (rows, inputs), outputs, (depths, rank, _) = x.shape, y.shape[1], a.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    if not rows:
        return y
    # float32 products use registers: 64 rows of rank 256 spill 4 kB per thread, 16 rows half of that.
    row_tile, out_tile, rank_tile = tile_of(rows, 16, 64 if x.element_size() == 2 else 16), 64, tile_of(rank, 16)
    add_residuals[(triton.cdiv(outputs, out_tile), triton.cdiv(rows, row_tile))](
        y, x, a.contiguous(), b.contiguous(), depth, rows, inputs, outputs, x.stride(0),
        Q=rank, R=depths, BN=row_tile, BI=64 if rank_tile <= 64 and x.element_size() == 2 else 32,
        BO=out_tile, BQ=rank_tile,
        # With 4 warps, 64 rows of rank 64 spill on compute capability 8.0.
        num_warps=4 if row_tile * rank_tile <= 2048 else 8, num_stages=3,
    )  # fmt: skip
    return y
