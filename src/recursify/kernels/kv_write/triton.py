"""KV-cache write in one launch: one program per row and key head.

Shape legend: N rows, K key heads, D head size, S page size, R depths. Locals: ``i_`` program, ``o_`` offsets, ``m_``
mask, ``b_`` values; ``B*`` tile sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from recursify.kernels.triton_math import tile_of


@triton.jit
def store_rows(
    key, value, key_pages, value_pages, slots, depth, page_offsets,
    stride_key_row, stride_key_head, stride_value_row, stride_value_head,
    K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program ``(i_n, i_k)``."""
    i_n, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + i_n).to(tl.int64)
    if slot < 0:
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_key = tl.load(key + i_n * stride_key_row + i_k * stride_key_head + o_d, mask=m_d, other=0.0)
    b_value = tl.load(value + i_n * stride_value_row + i_k * stride_value_head + o_d, mask=m_d, other=0.0)
    level = tl.load(depth + i_n).to(tl.int32)
    place = slot + tl.load(page_offsets + level).to(tl.int64) * S
    o_place = (place * K + i_k) * D + o_d
    tl.store(key_pages + o_place, b_key.to(key_pages.dtype.element_ty), mask=m_d)
    tl.store(value_pages + o_place, b_value.to(value_pages.dtype.element_ty), mask=m_d)


def store(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor,
    slots: Tensor, depth: Tensor, page_offsets: Tensor,
) -> None:  # fmt: skip
    """Launch; :func:`recursify.kernels.kv_write.store_keys_and_values` has checked the arguments."""
    rows, heads, size = key.shape
    if not rows:
        return
    key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
    store_rows[(rows, heads)](
        key, value, key_pages, value_pages, slots, depth, page_offsets,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        K=heads, D=size, S=key_pages.shape[1], BD=tile_of(size), num_warps=1,
    )  # fmt: skip
