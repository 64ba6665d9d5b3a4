"""Gather and scatter of a routed recursion: selected tokens are gathered and normed, and scattered back gated.

Each is one pass over the rows, where PyTorch makes two or three. It pays for the many rows of a prompt; for the rows of
a decoding step a launch costs more than the bytes.

Shape legend: T rows, N selected rows, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

__all__ = ["GATES", "gather_normed", "scatter_gated"]

GATES = ("residual", "mor")
"""Gates of a block that turns ``h`` into ``made``: ``residual`` is ``made + gate · (made − h)``, exactly ``made`` at a
gate of 0; ``mor`` is ``h + gate · made``."""


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
        rows: Integers ``[N]``: row numbers; a negative one gives 0.
        weight: ``[H]``, weight of the norm; None for none, as routers norm their input.
        eps: Constant added to the mean square; None for the machine epsilon of the dtype of ``states``, as in
            ``torch.nn.functional.rms_norm``.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes do not fit one another.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    if states.ndim != 2 or rows.ndim != 1 or (weight is not None and weight.shape != states.shape[1:]):
        raise ValueError(
            f"gather_normed takes states [T, H], rows [N] and weight [H]; got {list(states.shape)}, {list(rows.shape)} "
            f"and {None if weight is None else list(weight.shape)}."
        )
    eps = torch.finfo(states.dtype).eps if eps is None else eps
    return load_implementation(__name__, states.device, implementation).gather_normed(states, rows, weight, eps)


def scatter_gated(
    states: Tensor,
    made: Tensor,
    gate: Tensor,
    rows: Tensor,
    *,
    kind: str = "residual",
    implementation: Implementation = "auto",
) -> Tensor:
    """Write the gated output ``made`` of the block to ``states[rows]``, and return ``states``.

    Args:
        states: ``[T, H]``, float, with contiguous rows; written in place.
        made: ``[N, H]``, in the dtype of ``states``: output of the block, residual stream included.
        gate: ``[N]``, float.
        rows: Integers ``[N]``: distinct row numbers; negative ones are skipped.
        kind: Gate, one of :data:`GATES`.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes or dtypes do not fit one another, or ``kind`` is unknown.
        RuntimeError: Triton is requested and cannot run on this device.
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
        raise ValueError(
            "The rows of states must be contiguous, since they are written in place. Call contiguous() on it."
        )
    return load_implementation(__name__, states.device, implementation).scatter_gated(states, made, gate, rows, kind)
