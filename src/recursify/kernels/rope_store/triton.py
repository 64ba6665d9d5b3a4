"""RoPE and the store in one launch: a program per row and key head.

Shape legend: N rows, K key heads, D head size, E rotated part of it, S page size, R depths. Locals: ``i_`` program,
``o_`` offsets, ``m_`` mask, ``b_`` values; ``B*`` tile sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.triton_math import tile_of


@triton.jit
def rotate_and_store(
    key,
    value,
    key_pages,
    value_pages,
    slots,
    depth,
    count,
    page_offsets,
    cos,
    sin,
    stride_key_row,
    stride_key_head,
    stride_value_row,
    stride_value_head,
    stride_angle,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Program ``(i_n, i_k)``."""
    i_n, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + i_n).to(tl.int64)
    if slot < 0:
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_key = key + i_n * stride_key_row + i_k * stride_key_head
    b_key = tl.load(p_key + o_d, mask=m_d, other=0.0)
    b_value = tl.load(value + i_n * stride_value_row + i_k * stride_value_head + o_d, mask=m_d, other=0.0)
    if E > 0:
        m_e = o_d < E
        # A column's partner is half of E away; its second reading comes from the cache.
        o_partner = tl.where(o_d < E // 2, o_d + E // 2, o_d - E // 2)
        partner = tl.load(p_key + o_partner, mask=m_e, other=0.0).to(tl.float32)
        partner = tl.where(o_d < E // 2, -partner, partner)
        b_cos = tl.load(cos + i_n * stride_angle + o_d, mask=m_e, other=1.0).to(tl.float32)
        b_sin = tl.load(sin + i_n * stride_angle + o_d, mask=m_e, other=0.0).to(tl.float32)
        b_key = (b_key.to(tl.float32) * b_cos + partner * b_sin).to(b_key.dtype)
    first = tl.load(depth + i_n).to(tl.int32)
    end = tl.minimum(first + tl.load(count + i_n).to(tl.int32), R)
    for level in range(first, end):
        place = slot + tl.load(page_offsets + level).to(tl.int64) * S
        o_place = (place * K + i_k) * D + o_d
        tl.store(key_pages + o_place, b_key.to(key_pages.dtype.element_ty), mask=m_d)
        tl.store(value_pages + o_place, b_value.to(value_pages.dtype.element_ty), mask=m_d)


def store(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    depth: Tensor,
    count: Tensor,
    page_offsets: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """:func:`recursify.kernels.rope_store.store_keys_and_values`, checked there."""
    rows, heads, size = key.shape
    key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    if not rows:
        return
    rotate_and_store[(rows, heads)](
        key,
        value,
        key_pages,
        value_pages,
        slots,
        depth,
        count,
        page_offsets,
        cos,
        sin,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        0 if cos is None else cos.stride(0),
        K=heads,
        D=size,
        E=0 if cos is None else cos.shape[1],
        S=key_pages.shape[1],
        R=len(page_offsets),
        BD=tile_of(size),
        num_warps=1,
    )
