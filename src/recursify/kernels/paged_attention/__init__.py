"""Depth-paged attention: rows at different depths and positions, of different sequences, in one launch.

The layer of the shared block runs at several depths and keeps the keys of all of them in one tensor of pages. A page id
is valid at every depth: at depth ``d`` it refers to page ``id + page_offsets[d]``. A row is one token at one depth, so
rows of any depths can be mixed. Offsets are

- ``d · num_pages`` where every depth has its own keys,
- 0 where all depths share the keys of the first one,
- cumulative page counts where a routed model packs fewer tokens into deeper depths. A slot is then not a position, and
  windows need ``key_positions``.

Shape legend: N rows, H query heads, K key heads, D head size, P pages, S page size, M pages per row, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

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
    key_positions: Tensor | None = None,
    positions: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """``softmax(softcap · tanh(q kᵀ · scale / softcap)) v`` of each row over its keys, ``[N, H, D]``.

    Args:
        query: ``[N, H, D]``, rotated.
        key_pages: ``[P, S, K, D]``, contiguous, in the dtype of ``query``; ``K`` divides ``H``.
        value_pages: Like ``key_pages``.
        block_table: Integers ``[N, M]``: page ids before the page offset; ignored beyond a row's length.
        depth: Integers ``[N]``, from 0 to ``R - 1``, also of rows without keys.
        page_offsets: Integers ``[R]``.
        lengths: Integers ``[N]``: number of keys that a row sees, its own included. A row with 0 gives 0.
        scale: Factor of the scores; None for ``D ** -0.5``.
        window: Number of positions that a row sees, its own included; or one number per row, ``[N]``, with 0 for all.
        softcap: Bound of the scores; None for no bound.
        key_positions: Integers ``[P, S]``: positions of keys where slots are not positions. Needs ``positions``.
        positions: Integers ``[N]``: positions of the rows.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes or dtypes do not fit one another, or pages are not contiguous.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    _check(query, key_pages, value_pages, block_table, {"depth": depth, "lengths": lengths, "positions": positions})
    if (key_positions is None) != (positions is None):
        raise ValueError("key_positions and positions depend on each other. Pass both or neither.")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"A window must be at least 1, the row's own position; got {window}. Use None for all.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    module = load_implementation(__name__, query.device, implementation)
    targets = (block_table, depth, page_offsets, lengths)
    settings = (scale, window, softcap, key_positions, positions)
    return module.attend_pages(query, key_pages, value_pages, *targets, *settings)


def _check(query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, per_row: dict) -> None:
    rows, heads, size = query.shape
    if key_pages.shape != value_pages.shape or key_pages.shape[-1] != size or heads % key_pages.shape[2]:
        raise ValueError(
            f"query must be [N, H, D] and pages [P, S, K, D], where K divides H; got {list(query.shape)}, "
            f"{list(key_pages.shape)} and {list(value_pages.shape)}."
        )
    if {key_pages.dtype, value_pages.dtype} != {query.dtype}:
        raise ValueError(f"query and pages must have one dtype, got {query.dtype} and {key_pages.dtype}.")
    if size > LARGEST_HEAD:
        raise ValueError(f"The head size must be at most {LARGEST_HEAD}, got {size}.")
    if not key_pages.is_contiguous() or not value_pages.is_contiguous():
        raise ValueError("Pages are not contiguous, and slots are addressed by number. Call contiguous() on them.")
    for name, values in {"block_table": block_table, **per_row}.items():
        if values is not None and len(values) != rows:
            raise ValueError(f"{name} must have an entry for each of {rows} rows, got {len(values)}.")
