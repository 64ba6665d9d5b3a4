"""KV-cache write: keys and values of rows at mixed depths into pages, in one launch.

Shape legend: N rows, K key heads, D head size, P pages, S page size, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

__all__ = ["store_keys_and_values"]


def store_keys_and_values(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    depth: Tensor,
    page_offsets: Tensor,
    *,
    implementation: Implementation = "auto",
) -> None:
    """Write ``key`` and ``value`` to the slots of their rows, shifted by the page offset of each row's depth.

    Args:
        key: ``[N, K, D]``, rotated.
        value: Like ``key``.
        key_pages: ``[P, S, K, D]``, contiguous; written in place.
        value_pages: Like ``key_pages``.
        slots: Integers ``[N]``: ``page id · S + index in the page``, before the page offset is added. A row with a
            negative slot writes nothing. No two rows may share slot and depth.
        depth: Integers ``[N]``, from 0 to ``R - 1``.
        page_offsets: Integers ``[R]``.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes do not fit one another, or pages are not contiguous.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    if key.shape != value.shape or key_pages.shape != value_pages.shape or key.shape[1:] != key_pages.shape[2:]:
        raise ValueError(
            f"key and value must be [N, K, D] and pages [P, S, K, D]; got {list(key.shape)}, {list(value.shape)}, "
            f"{list(key_pages.shape)} and {list(value_pages.shape)}."
        )
    if not key_pages.is_contiguous() or not value_pages.is_contiguous():
        raise ValueError("Pages are not contiguous, and slots are addressed by number. Call contiguous() on them.")
    module = load_implementation(__name__, key.device, implementation)
    module.store(key, value, key_pages, value_pages, slots, depth, page_offsets)
