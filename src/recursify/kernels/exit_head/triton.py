"""The exit head in two launches: one over parts of the vocabulary, one to merge the parts.

For logits ``x`` with maximum ``m``, a part passes on ``m``, its index, the second maximum, ``s = Σ exp(x − m)`` and
``t = Σ exp(x − m) (x − m)``; log-sum-exp is ``m + log s`` and entropy ``log s − t / s``.

Shape legend: N rows, H hidden size, V vocabulary, P parts. Locals: ``i_`` program, ``o_`` offsets, ``m_`` mask, ``b_``
values; ``B*`` tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.dispatch import programs_to_fill
from recursify.kernels.triton_math import soft_capped, tile_of

from .reference import ExitStatistics

WAVES = 4
"""Number of parts per program that runs at once, to balance the load; merging keeps all parts of a row in registers."""


@triton.jit
def update_statistics(x, m_v, first, second, index, s, t, i_tile, BV: tl.constexpr):
    """Include one tile of logits ``x [BN, BV]`` in the running statistics ``[BN]``."""
    top, place = tl.max(x, axis=1, return_indices=True, return_indices_tie_break_left=True)
    next_top = tl.max(tl.where(tl.arange(0, BV)[None, :] == place[:, None], -float("inf"), x), axis=1)
    second = tl.where(top > first, tl.maximum(first, next_top), tl.maximum(second, top))
    # Strict: of equal logits, that of the earlier tile is kept.
    index = tl.where(top > first, i_tile * BV + place, index)
    m = tl.maximum(first, top)
    m_safe = tl.where(m == -float("inf"), 0.0, m)
    # An empty sum has m = -inf, and -inf times 0 is NaN.
    old = tl.where(first == -float("inf"), 0.0, first - m_safe)
    shift = tl.where(m_v[None, :] & (x > -float("inf")), x - m_safe[:, None], 0.0)
    e = tl.where(x > -float("inf"), tl.exp(shift), 0.0)
    t = tl.exp(old) * (t + s * old) + tl.sum(e * shift, axis=1)
    s = tl.exp(old) * s + tl.sum(e, axis=1)
    return m, second, index, s, t


@triton.jit
def read_parts(
    states, weight, bias, tops, choices, sums, N, H, V, stride_states, stride_weight,
    CAP: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program ``(i_n, i_p)``: one tile of rows over ``TILES`` tiles of the vocabulary.

    Writes ``tops [P, 2, N]``, ``choices [P, N]``, ``sums [P, 2, N]``.
    """
    # Rows vary fastest: programs that read the same weights run side by side and share them in the L2 cache.
    i_n, i_p = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_h = tl.arange(0, BK)
    p_states = states + o_n.to(tl.int64)[:, None] * stride_states
    first = tl.full((BN,), -float("inf"), tl.float32)
    second = tl.full((BN,), -float("inf"), tl.float32)
    index = tl.zeros((BN,), tl.int32)
    s = tl.zeros((BN,), tl.float32)
    t = tl.zeros((BN,), tl.float32)
    for i_tile in range(TILES):
        o_v = (i_p * TILES + i_tile) * BV + tl.arange(0, BV)
        m_v = o_v < V
        p_weight = weight + o_v.to(tl.int64)[None, :] * stride_weight
        x = tl.zeros((BN, BV), tl.float32)
        for k in range(0, H, BK):
            m_h = k + o_h < H
            b_states = tl.load(p_states + (k + o_h)[None, :], mask=m_n[:, None] & m_h[None, :], other=0.0)
            b_weight = tl.load(p_weight + (k + o_h)[:, None], mask=m_v[None, :] & m_h[:, None], other=0.0)
            x = tl.dot(b_states, b_weight, x, input_precision="ieee")
        if bias is not None:
            x += tl.load(bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
        if CAP is not None:
            x = soft_capped(x, CAP)
        x = tl.where(m_v[None, :], x, -float("inf"))
        first, second, index, s, t = update_statistics(x, m_v, first, second, index, s, t, i_tile, BV)
    tl.store(tops + (i_p * 2) * N + o_n, first, mask=m_n)
    tl.store(tops + (i_p * 2 + 1) * N + o_n, second, mask=m_n)
    # With NaN logits the maximum may be anywhere; the argmax must still be a valid token id.
    tl.store(choices + i_p * N + o_n, tl.minimum(i_p * TILES * BV + index, V - 1), mask=m_n)
    tl.store(sums + (i_p * 2) * N + o_n, s, mask=m_n)
    tl.store(sums + (i_p * 2 + 1) * N + o_n, t, mask=m_n)


@triton.jit
def merge_parts(tops, choices, sums, choice, readings, N, P, BP: tl.constexpr):
    """Program ``i_n``: the ``P`` parts of a row. ``readings [4, N]``: top-1, top-2, log-sum-exp, entropy."""
    i_n = tl.program_id(0)
    o_p = tl.arange(0, BP)
    m_p = o_p < P
    o_pairs = o_p * 2 * N + i_n
    firsts = tl.load(tops + o_pairs, mask=m_p, other=-float("inf"))
    seconds = tl.load(tops + o_pairs + N, mask=m_p, other=-float("inf"))
    m, part = tl.max(firsts, axis=0, return_indices=True, return_indices_tie_break_left=True)
    second = tl.maximum(tl.max(tl.where(o_p == part, -float("inf"), firsts), axis=0), tl.max(seconds, axis=0))
    shift = tl.where(firsts > -float("inf"), firsts - m, 0.0)
    scale = tl.where(firsts > -float("inf"), tl.exp(shift), 0.0)
    b_s = tl.load(sums + o_pairs, mask=m_p, other=0.0)
    b_t = tl.load(sums + o_pairs + N, mask=m_p, other=0.0)
    s = tl.sum(scale * b_s, axis=0)
    t = tl.sum(scale * (b_t + b_s * shift), axis=0)
    tl.store(choice + i_n, tl.load(choices + part * N + i_n, mask=part < P, other=0).to(tl.int64))
    tl.store(readings + i_n, m)
    tl.store(readings + N + i_n, second)
    tl.store(readings + 2 * N + i_n, m + tl.log(s))
    tl.store(readings + 3 * N + i_n, tl.log(s) - t / s)


def exit_statistics(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> ExitStatistics:
    """Launch; :func:`recursify.kernels.exit_head.exit_statistics` has checked the arguments."""
    (rows, size), entries = states.shape, len(weight)
    states, weight = _with_unit_stride(states), _with_unit_stride(weight)
    row_tile, entry_tile = tile_of(rows, 16, 64), tile_of(entries, 16, 128)
    tiles = triton.cdiv(entries, entry_tile)
    tiles_per_part = triton.cdiv(tiles, WAVES * programs_to_fill(states.device))
    parts = triton.cdiv(tiles, tiles_per_part)
    tops, sums = (torch.empty(parts, 2, rows, dtype=torch.float32, device=states.device) for _ in range(2))
    choices = torch.empty(parts, rows, dtype=torch.int32, device=states.device)
    choice = torch.empty(rows, dtype=torch.int64, device=states.device)
    readings = torch.empty(4, rows, dtype=torch.float32, device=states.device)
    if not rows:
        return ExitStatistics(choice, *readings)
    read_parts[(triton.cdiv(rows, row_tile), parts)](
        states, weight, bias, tops, choices, sums, rows, size, entries, states.stride(0), weight.stride(0),
        CAP=softcap, TILES=tiles_per_part, BN=row_tile, BV=entry_tile, BK=64 if states.dtype != torch.float32 else 32,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    merge_parts[(rows,)](tops, choices, sums, choice, readings, rows, parts, BP=tile_of(parts), num_warps=4)
    return ExitStatistics(choice, *readings)


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
