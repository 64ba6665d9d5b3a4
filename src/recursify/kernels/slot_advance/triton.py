"""State machine of the slots in one launch of one program, which finishes reading before it writes.

Shape legend: S slots, M pages per slot, E EOS ids, C entries of the ring. Locals: ``o_`` offsets,
``m_`` mask, ``b_`` values; ``BS`` tile size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.triton_math import tile_of

from .reference import OutputRing, Slots


@triton.jit
def append_entries(entries, counts, o_s, m_leave, b_choice, b_depth, written, iteration, C: tl.constexpr):
    """Append an entry for each slot of ``m_leave`` to the ring, and count entries and iterations."""
    rank = tl.cumsum(m_leave.to(tl.int32), axis=0) - 1
    p_entry = entries + ((written + rank) % C) * 4
    tl.store(p_entry, o_s, mask=m_leave)
    tl.store(p_entry + 1, b_choice, mask=m_leave)
    tl.store(p_entry + 2, b_depth, mask=m_leave)
    tl.store(p_entry + 3, o_s * 0 + iteration.to(tl.int32), mask=m_leave)
    tl.store(counts, written + tl.sum(m_leave.to(tl.int32), axis=0))
    tl.store(counts + 1, iteration + 1)


@triton.jit
def advance_all(
    active, token, depth, position, address, finished, leaves, choices, waits, limits, ends, block_table,
    entries, counts, stride_table, S,
    M: tl.constexpr, E: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, DEPTHS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One program for all slots."""
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    b_active = tl.load(active + o_s, mask=m_s, other=0).to(tl.int32) != 0
    b_depth = tl.load(depth + o_s, mask=m_s, other=0).to(tl.int32)
    b_position = tl.load(position + o_s, mask=m_s, other=0).to(tl.int32)
    b_choice = tl.load(choices + o_s, mask=m_s, other=0).to(tl.int32)
    asked = tl.load(leaves + o_s, mask=m_s, other=0).to(tl.int32) != 0
    b_moves = b_active
    if waits is not None:
        b_moves = b_active & (tl.load(waits + o_s, mask=m_s, other=0).to(tl.int32) == 0)
    written = tl.load(counts)
    iteration = tl.load(counts + 1)
    # Stores below overwrite what was read above, and warps are not in step.
    tl.debug_barrier()

    m_leave = b_moves & (asked | (b_depth == DEPTHS - 1))
    m_stay = b_moves & ~m_leave
    append_entries(entries, counts, o_s, m_leave, b_choice, b_depth, written, iteration, C)

    b_position += m_leave.to(tl.int32)
    m_ended = m_leave & (b_position >= tl.load(limits + o_s, mask=m_s, other=0).to(tl.int32))
    for i in range(E):
        m_ended = m_ended | (m_leave & (b_choice == tl.load(ends + i).to(tl.int32)))
    page = b_position // PAGE
    m_table = m_s & (page < M)
    block = tl.load(block_table + o_s * stride_table + page, mask=m_table, other=-1).to(tl.int64)
    m_next = b_active & ~m_ended & (block >= 0)
    b_address = tl.where(m_next, block * PAGE + b_position % PAGE, -1)

    tl.store(token + o_s, b_choice.to(token.dtype.element_ty), mask=m_leave)
    b_depth = tl.where(m_leave, 0, b_depth + m_stay.to(tl.int32))
    tl.store(depth + o_s, b_depth.to(depth.dtype.element_ty), mask=m_s)
    tl.store(position + o_s, b_position.to(position.dtype.element_ty), mask=m_s)
    tl.store(address + o_s, b_address.to(address.dtype.element_ty), mask=m_s)
    tl.store(active + o_s, m_next, mask=m_s)
    tl.store(finished + o_s, m_ended, mask=m_ended)


def advance(
    slots: Slots, leaves: Tensor, choices: Tensor, waits: Tensor | None, limits: Tensor, ends: Tensor,
    block_table: Tensor, page_size: int, num_depths: int, ring: OutputRing,
) -> None:  # fmt: skip
    """Launch; :func:`recursify.kernels.slot_advance.advance_slots` has checked the arguments."""
    count = len(slots.active)
    if not count:
        return
    table, tile = block_table if block_table.stride(1) == 1 else block_table.contiguous(), tile_of(count)
    advance_all[(1,)](
        slots.active, slots.token, slots.depth, slots.position, slots.address, slots.finished,
        leaves, choices, waits, limits, ends, table, ring.entries, ring.counts, table.stride(0), count,
        M=table.shape[1], E=len(ends), C=len(ring.entries), PAGE=page_size, DEPTHS=num_depths, BS=tile,
        num_warps=max(1, min(16, tile // 128)),
    )  # fmt: skip
