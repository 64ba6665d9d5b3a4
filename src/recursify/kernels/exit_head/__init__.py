"""Exit head: what a recursion boundary says, and how sure it is, without writing logits.

A confidence needs the first and the second logit and the log-sum-exp, an entropy policy one sum more. PyTorch makes
``[N, V]`` logits in memory for them and reads those several times. The Triton form reads the weight once: programs
share out the vocabulary, and each keeps a running maximum, second maximum, index and rescaled sums; a second launch
merges them.

Shape legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from recursify.kernels.dispatch import Implementation, uses_triton

from . import reference
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
    """First choice, its logit and the next one's, log-sum-exp and entropy of ``softcap · tanh((W h + b) / softcap)``.

    Args:
        states: ``[N, H]``, float, after the final norm.
        weight: ``[V, H]``, of the head, in the dtype of ``states``.
        bias: ``[V]``, or none.
        softcap: None for logits as they are.
        vocabulary: Judge by so many entries, the first ones; None for all.
        implementation: See :mod:`recursify.kernels.dispatch`.

    Raises:
        ValueError: Shapes or dtypes that do not fit one another, or a ``vocabulary`` that ``weight`` does not have.
        RuntimeError: Triton is asked for, and cannot run on this device.
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
    if uses_triton(implementation, states.device):
        from . import triton

        return triton.exit_statistics(states, weight, bias, softcap)
    return reference.exit_statistics(states, weight, bias, softcap)
