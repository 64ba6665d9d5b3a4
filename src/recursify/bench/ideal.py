"""What leaving early can gain at most, from what the parts of an iteration cost.

``p_d`` is the part of the tokens that leave after recursion ``d``, ``D = Σ (d + 1) p_d`` the recursions per token, and
``R`` all of them. With costs per token of entering (embedding and prelude) ``c_in``, of one recursion ``c_b``, of
leaving (coda, readout, sampling) ``c_out``, and, where tokens leave early, of tests and of keys and values of skipped
depths ``c_f``::

    G* = (c_in + R c_b + c_out) / (c_in + D c_b + c_f + c_out)

and with free ends ``R / D``. What an engine gains, ``G``, over itself at full depth is measured beside it; ``η = G /
G*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds per new token; ``block`` per token and recursion.

    Attributes:
        enter: Embedding and prelude.
        block: One recursion.
        leave: Coda, readout and sampling.
        skip: Exit tests, and keys and values of skipped depths, where tokens leave early.
    """

    enter: float
    block: float
    leave: float
    skip: float = 0.0


def ideal_gain(costs: Costs, num_recursions: int, mean_recursions: float) -> float:
    """``G*`` of tokens that run ``mean_recursions`` instead of ``num_recursions``."""
    ends = costs.enter + costs.leave
    return (ends + num_recursions * costs.block) / (ends + mean_recursions * costs.block + costs.skip)


def ideal_gain_per_call(costs: Costs, num_recursions: int, mean_recursions: float) -> float:
    """The same where a call costs as much for few rows as for many, as reading weights does.

    At full depth rows that began together enter and leave together, so that ``S`` tokens take one call of each end and
    ``R`` of the block. Leaving early, every call of the block has one of each end beside it, for ``S / D`` tokens::

        G*_call = (c_in + R c_b + c_out) / (D (c_in + c_b + c_out) + c_f)

    The costs are those of a token in a full batch, to which those of a call are proportional. Below 1 it says that
    tokens had better wait for one another.
    """
    ends = costs.enter + costs.leave
    return (ends + num_recursions * costs.block) / (mean_recursions * (ends + costs.block) + costs.skip)


def mean_recursions(parts: Mapping[int, float]) -> float:
    """``D``, of the part of the tokens by the depth that they leave after."""
    return sum((depth + 1) * part for depth, part in parts.items()) / sum(parts.values())


def synchronous_recursions(parts: Mapping[int, float], batch: int) -> float:
    """Recursions per token where ``batch`` rows wait for the deepest of them: the mean of the largest of ``batch``."""
    total, expected, below = sum(parts.values()), 0.0, 0.0
    for depth in range(max(parts) + 1):
        expected += 1 - (below / total) ** batch
        below += parts.get(depth, 0.0)
    return expected
