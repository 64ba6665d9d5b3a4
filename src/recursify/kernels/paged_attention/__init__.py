"""Depth-paged attention: rows at different depths, and at different places of different sequences, in one launch.

A layer that runs at several depths has its keys in one tensor of pages. A page id is good for every depth: at depth
``d`` it names the page ``id + page_offsets[d]``. So a row is a token at a depth, a prompt is rows that share a table,
and prompts and single tokens mix freely.

- Keys of all depths: ``page_offsets[d] = d · num_pages``. Shared keys: 0. Packed keys of a routed model, which has
  fewer tokens at deeper recursions: the sums of the page counts before, with ``key_positions`` for windows, since
  slots are no positions there.
- ``exit_depths`` looks a token that left early up where it has keys last (``latest``), without copying those.

Shape legend: N rows, H query heads, K key heads, D head size, P pages, S page size, M pages of a table, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference

__all__ = ["attend_pages"]

LARGEST_HEAD = 256


def attend_pages(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    depth: Tensor,
    page_offsets: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | Tensor | None = None,
    softcap: float | None = None,
    exit_depths: Tensor | None = None,
    key_positions: Tensor | None = None,
    positions: Tensor | None = None,
    num_splits: int | None = None,
    group: int = 1,
    implementation: Implementation = "auto",
) -> Tensor:
    """``softmax(softcap · tanh(q kᵀ · scale / softcap)) v`` of each row over its keys, ``[N, H, D]``.

    Args:
        query: ``[N, H, D]``, rotated.
        key_pages: ``[P, S, K, D]``, contiguous, in the dtype of ``query``; ``K`` divides ``H``.
        value_pages: Like ``key_pages``.
        block_table: Integers ``[N, M]``: page ids before the offset of a depth. Beyond a row's length they may be
            anything.
        depth: Integers ``[N]``, from 0 to ``R - 1``, also of rows with no keys.
        page_offsets: Integers ``[R]``.
        lengths: Integers ``[N]``: the keys a row sees, its own included. A row with 0 gives 0.
        scale: None for ``D ** -0.5``.
        window: Positions that a row sees, its own included; or one per row, ``[N]``, where 0 is all.
        softcap: None for scores as they are.
        exit_depths: Integers ``[pages, S]``, by page id before the offset: the deepest depth a token has keys at.
        key_positions: Integers ``[P, S]``, where slots are not positions. Needs ``positions``.
        positions: Integers ``[N]``, of the rows.
        num_splits: Into how many parts a row's keys are shared out, in Triton. None chooses by the shapes; with 1 a
            row's result does not depend on how many there are beside it.
        group: So many rows one after the other share a page table and a depth, as the tokens of a prompt do; in Triton
            their keys are then read once. ``N`` is a multiple of it; rows of length 0 fill up.
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes or dtypes that do not fit one another.
        RuntimeError: Triton is asked for, and cannot run on this device.
    """
    _check(query, key_pages, value_pages, block_table, {"depth": depth, "lengths": lengths, "positions": positions})
    if (key_positions is None) != (positions is None):
        raise ValueError("key_positions and positions go together: one says where keys are, the other where rows are.")
    if window is not None and isinstance(window, int) and window < 1:
        raise ValueError(f"A window has 1 position at least, its own; got {window}. None is for all.")
    if group < 1 or len(query) % group:
        raise ValueError(f"Rows come in groups of {group}, and {len(query)} are no multiple of that.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if uses_triton(implementation, query.device):
        from . import triton

        places = triton.Places(block_table, depth, page_offsets, lengths, exit_depths, key_positions, positions)
        return triton.attend_pages(query, key_pages, value_pages, places, scale, window, softcap, num_splits, group)
    page_size = key_pages.shape[1]
    slots, there = reference.slots_of(block_table, depth, page_offsets, lengths, page_size, exit_depths)
    visible = reference.visible_in(slots, there, lengths, window, key_positions, positions)
    return reference.attend(query, key_pages, value_pages, slots, visible, scale, softcap)


def _check(query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, per_row: dict) -> None:
    rows, heads, size = query.shape
    if key_pages.shape != value_pages.shape or key_pages.shape[-1] != size or heads % key_pages.shape[2]:
        raise ValueError(
            f"query [N, H, D] and pages [P, S, K, D] must agree, and K divide H; got {list(query.shape)}, "
            f"{list(key_pages.shape)} and {list(value_pages.shape)}."
        )
    if {key_pages.dtype, value_pages.dtype} != {query.dtype}:
        raise ValueError(f"query and pages must be of one dtype, got {query.dtype} and {key_pages.dtype}.")
    if size > LARGEST_HEAD:
        raise ValueError(f"Heads are of {LARGEST_HEAD} at most, got {size}.")
    if not key_pages.is_contiguous() or not value_pages.is_contiguous():
        raise ValueError("Pages must be contiguous: a slot is found by its number.")
    for name, values in {"block_table": block_table, **per_row}.items():
        if values is not None and len(values) != rows:
            raise ValueError(f"{name} must have an entry for each of {rows} rows, got {len(values)}.")
