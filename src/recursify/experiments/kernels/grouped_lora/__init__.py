"""Low-rank residuals of relaxed recursions, for rows at mixed depths.

There are few depths, so two library forms are exact and fast (:mod:`.reference`): one masked product over the factors
of all depths, and grouped products of sorted rows. The Triton form is one launch for rows in any order: a tile of rows
skips the depths that none of its rows has. Which form is faster on a GPU has not been measured;
``benchmarks/kernel_speed.py`` measures it.

Shape legend: N rows, I and O features, r rank, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

__all__ = ["add_depth_lora"]

LARGEST_RANK = 256


def add_depth_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor, *, implementation: Implementation = "auto"
) -> Tensor:
    """Add ``(x a[depth]ᵀ) b[depth]ᵀ`` to ``y``, and return it.

    Args:
        y: ``[N, O]``, contiguous; written in place.
        x: ``[N, I]``.
        a: ``[R, r, I]``, in the dtype of ``x``.
        b: ``[R, O, r]``, in the dtype of ``x``.
        depth: Integers ``[N]``; a row with a negative depth does not change.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`. ``auto`` uses PyTorch above
            rank 256.

    Raises:
        ValueError: Shapes or dtypes do not fit one another, or the rank is too large for Triton.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    rows, inputs = x.shape
    depths, rank, _ = a.shape
    if y.shape != (rows, b.shape[1]) or a.shape[2] != inputs or b.shape != (depths, y.shape[1], rank):
        raise ValueError(
            f"y [N, O], x [N, I], a [R, r, I] and b [R, O, r] must agree; got {list(y.shape)}, {list(x.shape)}, "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    if len(depth) != rows:
        raise ValueError(f"depth must have an entry for each of {rows} rows, got {len(depth)}.")
    if {y.dtype, x.dtype, a.dtype, b.dtype} != {x.dtype}:
        raise ValueError(f"y, x, a and b must have one dtype; got {y.dtype}, {x.dtype}, {a.dtype} and {b.dtype}.")
    if not y.is_contiguous():
        raise ValueError("y must be contiguous, since it is written in place.")
    if rank > LARGEST_RANK:
        if implementation == "triton":
            raise ValueError(
                f"The rank must be at most {LARGEST_RANK} in Triton, got {rank}. Use 'auto' or 'reference'."
            )
        implementation = "reference"
    return load_implementation(__name__, x.device, implementation).add_depth_lora(y, x, a, b, depth)
