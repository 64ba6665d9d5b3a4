"""The two ends of a routed recursion: chosen tokens are taken out and normed, and come back gated.

Each is one pass over the rows, where PyTorch makes two or three. It pays where there are many rows, in prompts; for the
rows of a decoding step a launch costs more than the bytes.

Shape legend: T rows of all, N taken rows, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference

__all__ = ["GATES", "gather_normed", "scatter_gated"]

GATES = ("residual", "mor")
"""``made + gate · (made − h)``, which at a gate of 0 is what was made, to the last bit; and ``h + gate · made``."""


def gather_normed(
    states: Tensor,
    rows: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """``g = states[rows]`` and ``g / √(mean(g²) + eps) · weight``, each ``[N, H]``.

    Args:
        states: ``[T, H]``, float.
        rows: Integers ``[N]``; negative ones give 0.
        weight: ``[H]``, of the norm; None for none, as a router scales what it sees.
        eps: None for the machine epsilon of the dtype of ``states``, as in ``torch.nn.functional.rms_norm``.
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes that do not fit one another.
        RuntimeError: Triton is asked for, and cannot run on this device.
    """
    if states.ndim != 2 or rows.ndim != 1 or (weight is not None and weight.shape != states.shape[1:]):
        raise ValueError(
            f"gather_normed takes states [T, H], rows [N] and weight [H]; got {list(states.shape)}, {list(rows.shape)} "
            f"and {None if weight is None else list(weight.shape)}."
        )
    eps = torch.finfo(states.dtype).eps if eps is None else eps
    if uses_triton(implementation, states.device):
        from . import triton

        return triton.gather_normed(states, rows, weight, eps)
    return reference.gather_normed(states, rows, weight, eps)


def scatter_gated(
    states: Tensor,
    made: Tensor,
    gate: Tensor,
    rows: Tensor,
    *,
    kind: str = "residual",
    implementation: Implementation = "auto",
) -> Tensor:
    """Put what the block ``made`` of ``states[rows]`` back there, and return ``states``.

    Args:
        states: ``[T, H]``, float, contiguous rows; written to.
        made: ``[N, H]``, in the dtype of ``states``, its own residual stream included.
        gate: ``[N]``, float.
        rows: Integers ``[N]``, no two alike; negative ones are left out.
        kind: Of :data:`GATES`.
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes or dtypes that do not fit one another, or another ``kind``.
        RuntimeError: Triton is asked for, and cannot run on this device.
    """
    if kind not in GATES:
        raise ValueError(f"Unknown gate '{kind}'. Use one of: {', '.join(GATES)}.")
    if made.shape != (len(rows), states.shape[1]) or gate.shape != rows.shape or made.dtype != states.dtype:
        raise ValueError(
            f"scatter_gated takes states [T, H], made [N, H] of one dtype, gate [N] and rows [N]; got "
            f"{list(states.shape)} {states.dtype}, {list(made.shape)} {made.dtype}, {list(gate.shape)} and "
            f"{list(rows.shape)}."
        )
    if states.stride(1) != 1:
        raise ValueError("states are written to, and must have their columns side by side.")
    if uses_triton(implementation, states.device):
        from . import triton

        return triton.scatter_gated(states, made, gate, rows, kind)
    return reference.scatter_gated(states, made, gate, rows, kind)
