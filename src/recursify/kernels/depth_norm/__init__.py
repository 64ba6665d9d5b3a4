"""Residual and RMS norm in one pass, with a weight for each row's depth.

Recursions may have their own norms. PyTorch would gather the weights of mixed rows into ``[N, H]``; here each program
reads the weight of its row in place.

Shape legend: N rows, H hidden size, R depths.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

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
        residual: Like ``states``; None to norm ``states`` itself.
        weight: ``[R, H]``, any float dtype.
        depth: Integers ``[N]``, from 0 to ``R - 1``.
        eps: Constant added to the mean square.
        adds_one: Flag to scale by ``1 + weight`` (Gemma).
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes do not fit one another.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    if states.ndim != 2 or weight.ndim != 2 or states.shape[1] != weight.shape[1] or len(depth) != len(states):
        raise ValueError(
            f"add_and_norm takes states [N, H], weight [R, H] and depth [N]; got {list(states.shape)}, "
            f"{list(weight.shape)} and {list(depth.shape)}."
        )
    if residual is not None and (residual.shape != states.shape or residual.dtype != states.dtype):
        raise ValueError(
            f"residual must have the shape and dtype of states, {list(states.shape)} {states.dtype}; got "
            f"{list(residual.shape)} {residual.dtype}."
        )
    module = load_implementation(__name__, states.device, implementation)
    return module.add_and_norm(states, residual, weight, depth, eps, adds_one)
