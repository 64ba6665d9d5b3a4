"""Residual and RMS norm in one pass, with a weight for each row's depth.

Where recursions have norms of their own, rows at mixed depths would need a gathered weight ``[N, H]``; here a program
reads its row's weight where it is.

Shape legend: N rows, H hidden size, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference

__all__ = ["add_and_norm"]


def add_and_norm(
    states: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    depth: Tensor,
    *,
    eps: float = 1e-6,
    adds_one: bool = False,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """``s = states + residual`` and ``s / √(mean(s²) + eps) · weight[depth]``, each ``[N, H]``.

    Args:
        states: ``[N, H]``, float.
        residual: Like ``states``; None for none, and then the sum is ``states`` itself.
        weight: ``[R, H]``, any float dtype.
        depth: Integers ``[N]``, from 0 to ``R - 1``.
        eps: Added to the mean square.
        adds_one: The scale is ``1 + weight`` (Gemma).
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes that do not fit one another.
        RuntimeError: Triton is asked for, and cannot run on this device.
    """
    if states.ndim != 2 or weight.ndim != 2 or states.shape[1] != weight.shape[1] or len(depth) != len(states):
        raise ValueError(
            f"add_and_norm takes states [N, H], weight [R, H] and depth [N]; got {list(states.shape)}, "
            f"{list(weight.shape)} and {list(depth.shape)}."
        )
    if residual is not None and (residual.shape != states.shape or residual.dtype != states.dtype):
        raise ValueError(
            f"residual must be like states, {list(states.shape)} {states.dtype}; got {list(residual.shape)} "
            f"{residual.dtype}."
        )
    if uses_triton(implementation, states.device):
        from . import triton

        return triton.add_and_norm(states, residual, weight, depth, eps, adds_one)
    return reference.add_and_norm(states, residual, weight, depth, eps, adds_one)
