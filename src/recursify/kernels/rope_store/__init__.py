"""RoPE on keys and their way into pages in one launch, at one depth or at several.

A token that leaves early has no keys at the depths it skips. Writing those it has at every deeper depth as well
(``count`` above 1) lets any attention over pages serve it, at the price of the copies; :mod:`..paged_attention` can
look them up instead.

Shape legend: N rows, K key heads, D head size, E rotated part of it, P pages, S page size, R depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference

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
    count: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    implementation: Implementation = "auto",
) -> None:
    """Write ``key``, rotated, and ``value`` where ``slots`` and ``depth`` say.

    Args:
        key: ``[N, K, D]``, not yet rotated if ``cos`` and ``sin`` are given.
        value: Like ``key``.
        key_pages: ``[P, S, K, D]``, contiguous; written to.
        value_pages: Like ``key_pages``.
        slots: Integers ``[N]``: ``page id · S + place in the page``, before the offset of a depth; negative for a row
            that writes nothing. No two rows may have the same slot at the same depth.
        depth: Integers ``[N]``.
        page_offsets: Integers ``[R]``.
        count: Integers ``[N]``: at how many depths to write, from ``depth`` on, as far as there are depths. None for 1.
        cos: ``[N, E]``, as transformers' rotary embeddings make it: both halves alike. ``E`` is even, and ``D`` at
            most.
        sin: Like ``cos``.
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes that do not fit one another.
        RuntimeError: Triton is asked for, and cannot run on this device.
    """
    _check(key, value, key_pages, value_pages, cos, sin)
    count = torch.ones_like(depth) if count is None else count
    if uses_triton(implementation, key.device):
        from . import triton

        triton.store(key, value, key_pages, value_pages, slots, depth, count, page_offsets, cos, sin)
        return
    if cos is not None and sin is not None:
        key = reference.rotated(key, cos, sin)
    reference.store(key, key_pages, slots, depth, count, page_offsets)
    reference.store(value, value_pages, slots, depth, count, page_offsets)


def _check(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, cos: Tensor | None, sin: Tensor | None
) -> None:
    if key.shape != value.shape or key_pages.shape != value_pages.shape or key.shape[1:] != key_pages.shape[2:]:
        raise ValueError(
            f"key and value [N, K, D] and pages [P, S, K, D] must agree; got {list(key.shape)}, {list(value.shape)}, "
            f"{list(key_pages.shape)} and {list(value_pages.shape)}."
        )
    if not key_pages.is_contiguous() or not value_pages.is_contiguous():
        raise ValueError("Pages must be contiguous: a slot is found by its number.")
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape:
        raise ValueError("cos and sin go together, in one shape.")
    if len(cos) != len(key) or cos.shape[1] % 2 or cos.shape[1] > key.shape[2]:
        raise ValueError(
            f"cos and sin must be [{len(key)}, E] with an even E of {key.shape[2]} at most, got {list(cos.shape)}."
        )
