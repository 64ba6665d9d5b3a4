"""Low-rank residuals of relaxed recursions, for rows at mixed depths.

Depths are few, so two library forms are exact and fast (:mod:`.reference`): one product over all depths' factors with
what is not wanted set to 0, and grouped products of sorted rows. The Triton form is one launch, for rows in any order:
tiles of rows pass over the depths that none of them has. Which is faster on a GPU has not been measured yet;
``benchmarks/kernel_speed.py`` does.

Shape legend: N rows, I and O features, r rank, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference

__all__ = ["add_depth_lora"]

LARGEST_RANK = 256


def add_depth_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, depth: Tensor, *, implementation: Implementation = "auto"
) -> Tensor:
    """Add ``(x a[depth]ᵀ) b[depth]ᵀ`` to ``y``, and return it.

    Args:
        y: ``[N, O]``, contiguous; written to.
        x: ``[N, I]``.
        a: ``[R, r, I]``, in the dtype of ``x``.
        b: ``[R, O, r]``, likewise.
        depth: Integers ``[N]``; negative for a row that gets nothing.
        implementation: See :mod:`recursify.kernels.dispatch`. ``auto`` keeps to PyTorch above rank 256.

    Raises:
        ValueError: Shapes or dtypes that do not fit one another.
        RuntimeError: Triton is asked for, and cannot run on this device.
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
        raise ValueError(f"All must be of one dtype; got {y.dtype}, {x.dtype}, {a.dtype} and {b.dtype}.")
    if not y.is_contiguous():
        raise ValueError("y is written to, and must be contiguous.")
    if rank > LARGEST_RANK:
        if implementation == "triton":
            raise ValueError(f"The Triton form holds a row's rank whole, {LARGEST_RANK} at most; got {rank}.")
        implementation = "reference"
    if uses_triton(implementation, x.device):
        from . import triton

        return triton.add_depth_lora(y, x, a, b, depth)
    return reference.add_depth_lora(y, x, a, b, depth)
