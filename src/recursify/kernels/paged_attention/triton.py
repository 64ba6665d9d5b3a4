"""Depth-paged attention in one launch, or two where the keys of a row are split.

One program handles one row, one key head and one part of the keys. The query heads that share the key head are the rows
of its matrix products, so keys are read once. A second launch merges the parts by their maxima and sums.

Shape legend: N rows, K key heads, G query heads per key head, D head size, S page size, C parts. Locals: ``i_``
program, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` values; ``B*`` tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.dispatch import programs_to_fill
from recursify.kernels.triton_math import soft_capped, tile_of

MOST_PARTS = 32
TILES_PER_PART = 4
"""Minimum number of key tiles per part; below it, merging costs more than the split saves."""


@triton.jit
def attend_parts(
    query, key_pages, value_pages, block_table, depth, page_offsets, lengths, key_positions, positions, windows,
    out, parts, sums, scale, stride_query_row, stride_query_head, stride_table,
    WINDOW: tl.constexpr, CAP: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    C: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program ``(i_n, i_k, i_c)``.

    Writes ``out [N, K·G, D]`` where ``C`` is 1, else ``parts [N, K·G, C, D]`` and ``sums [N, K·G, C, 2]``.
    """
    i_n, i_k, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_g, o_d = tl.arange(0, BG), tl.arange(0, BD)
    m_g, m_d = o_g < G, o_d < D
    m_q = m_g[:, None] & m_d[None, :]
    o_heads = i_k * G + o_g
    p_query = query + i_n * stride_query_row + o_heads[:, None] * stride_query_head + o_d[None, :]
    b_query = tl.load(p_query, mask=m_q, other=0.0)
    length = tl.load(lengths + i_n).to(tl.int32)
    own_depth = tl.load(depth + i_n).to(tl.int32)
    offset = tl.load(page_offsets + own_depth).to(tl.int64)
    first = 0
    oldest = -1
    if WINDOW is not None or windows is not None:
        width = length * 0 + WINDOW if windows is None else tl.load(windows + i_n).to(tl.int32)
        # Nothing falls out of a window of 0.
        if key_positions is None:
            first = tl.where(width > 0, tl.maximum(length - width, 0), 0)
        else:
            own = tl.load(positions + i_n).to(tl.int32)
            oldest = tl.where(width > 0, own - width, -1)
    span = tl.cdiv(tl.cdiv(length - first, BT), C) * BT
    begin = first + i_c * span
    end = tl.minimum(begin + span, length)

    top = tl.full((BG,), -float("inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    b_out = tl.zeros((BG, BD), tl.float32)
    for start in range(begin, end, BT):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < end
        block = tl.load(block_table + i_n * stride_table + o_t // S, mask=m_t, other=0).to(tl.int64)
        slot = (block + offset) * S + o_t % S
        m_seen = m_t
        if key_positions is not None:
            m_seen = m_t & (tl.load(key_positions + slot, mask=m_t, other=0).to(tl.int32) > oldest)
        o_slot = (slot * K + i_k)[:, None] * D + o_d[None, :]
        m_slot = m_t[:, None] & m_d[None, :]
        b_keys = tl.load(key_pages + o_slot, mask=m_slot, other=0.0)
        scores = tl.dot(b_query, tl.trans(b_keys), input_precision="ieee") * scale
        if CAP is not None:
            scores = soft_capped(scores, CAP)
        scores = tl.where(m_seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # The maximum is -inf until a key has been seen, and -inf less -inf is NaN.
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        b_values = tl.load(value_pages + o_slot, mask=m_slot, other=0.0)
        b_out = b_out * shrink[:, None]
        b_out = tl.dot(weights.to(b_values.dtype), b_values, b_out, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        top = new_top

    # Parts are divided too, so that merged numbers are as large as the values.
    b_out = b_out / tl.where(total > 0, total, 1.0)[:, None]
    o_rows = i_n * K * G + o_heads
    if C == 1:
        tl.store(out + o_rows[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_q)
    else:
        o_parts = o_rows * C + i_c
        tl.store(parts + o_parts[:, None] * D + o_d[None, :], b_out, mask=m_q)
        tl.store(sums + o_parts * 2, top, mask=m_g)
        tl.store(sums + o_parts * 2 + 1, total, mask=m_g)


@triton.jit
def merge_parts(parts, sums, out, D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Program ``i``, one row and query head: ``out [i]`` from ``parts [i, C, D]``."""
    i = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, BC), tl.arange(0, BD)
    m_c, m_d = o_c < C, o_d < D
    tops = tl.load(sums + (i * C + o_c) * 2, mask=m_c, other=-float("inf"))
    totals = tl.load(sums + (i * C + o_c) * 2 + 1, mask=m_c, other=0.0)
    top = tl.max(tops, axis=0)
    shares = tl.exp(tops - tl.where(top == -float("inf"), 0.0, top)) * totals
    total = tl.sum(shares, axis=0)
    b_parts = tl.load(parts + (i * C + o_c)[:, None] * D + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0)
    b_out = tl.sum(b_parts * shares[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + i * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


def num_parts(rows: int, heads: int, keys: int, tile: int, device: torch.device) -> int:
    """Number of programs that share the ``keys`` of a row, so that few rows still fill ``device``."""
    most = min(MOST_PARTS, triton.cdiv(keys, tile * TILES_PER_PART))
    return max(1, min(most, triton.cdiv(programs_to_fill(device), max(1, rows * heads))))


def attend_pages(
    query: Tensor, key_pages: Tensor, value_pages: Tensor,
    block_table: Tensor, depth: Tensor, page_offsets: Tensor, lengths: Tensor,
    scale: float, window: int | Tensor | None, softcap: float | None,
    key_positions: Tensor | None, positions: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launch; :func:`recursify.kernels.paged_attention.attend_pages` has checked the arguments."""
    rows, query_heads, size = query.shape
    _, page_size, heads, _ = key_pages.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    width = tile_of(size, 16)
    # 64 keys of size 256 take 200 registers on compute capability 9.0: two programs run at a time.
    tile = 64 if width <= 128 and query.dtype != torch.float32 else 32
    splits = num_parts(rows, heads, table.shape[1] * page_size, tile, query.device)
    out = torch.empty(rows, query_heads, size, dtype=query.dtype, device=query.device)
    if not rows:
        return out
    parts = sums = out
    if splits > 1:
        parts = torch.empty(rows, query_heads, splits, size, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, query_heads, splits, 2, dtype=torch.float32, device=query.device)
    attend_parts[(rows, heads, splits)](
        query, key_pages, value_pages, table, depth, page_offsets, lengths, key_positions, positions,
        window if isinstance(window, Tensor) else None, out, parts, sums, scale,
        query.stride(0), query.stride(1), table.stride(0),
        WINDOW=None if isinstance(window, Tensor) else window, CAP=softcap,
        K=heads, G=query_heads // heads, D=size, S=page_size, C=splits,
        BG=tile_of(query_heads // heads, 16), BT=tile, BD=width,
        num_warps=4, num_stages=3,  # one for the page ids, which the other loads depend on
    )  # fmt: skip
    if splits > 1:
        merge_parts[(rows * query_heads,)](
            parts, sums, out, D=size, C=splits, BC=tile_of(splits), BD=width, num_warps=4 if width > 64 else 2
        )
    return out
