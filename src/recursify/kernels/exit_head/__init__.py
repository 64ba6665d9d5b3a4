"""Exit head: statistics of the logits at an exit, without writing the logits to memory.

The confidence policy needs the two highest logits and the log-sum-exp, the entropy policy one more sum. PyTorch writes
``[N, V]`` logits and reads them several times. The Triton form reads the weight once: each program handles a part of
the vocabulary and keeps a running maximum, second maximum, argmax and rescaled sums, which a second launch merges.

Shape legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, load_implementation

from .reference import ExitStatistics

__all__ = ["ExitStatistics", "exit_statistics"]


def exit_statistics(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    vocabulary: int | None = None,
    implementation: Implementation = "auto",
) -> ExitStatistics:
    """Argmax, two highest values, log-sum-exp and entropy of the logits ``softcap · tanh((W h + b) / softcap)``.

    Args:
        states: ``[N, H]``, float, after the final norm.
        weight: ``[V, H]``, weight of the head, in the dtype of ``states``.
        bias: ``[V]``, or None.
        softcap: Bound of the logits; None for no bound.
        vocabulary: Number of vocabulary entries to use, counted from the first; None for all.
        implementation: Name of the implementation, see :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes or dtypes do not fit one another, or ``vocabulary`` is out of range.
        RuntimeError: Triton is requested and cannot run on this device.
    """
    if states.ndim != 2 or weight.ndim != 2 or states.shape[1] != weight.shape[1] or states.dtype != weight.dtype:
        raise ValueError(
            f"exit_statistics takes states [N, H] and weight [V, H] of one dtype, got {list(states.shape)} "
            f"{states.dtype} and {list(weight.shape)} {weight.dtype}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have an entry for each of {len(weight)}, got {list(bias.shape)}.")
    if vocabulary is not None:
        if not 1 <= vocabulary <= len(weight):
            raise ValueError(f"vocabulary must be between 1 and {len(weight)}, got {vocabulary}.")
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return load_implementation(__name__, states.device, implementation).exit_statistics(states, weight, bias, softcap)
