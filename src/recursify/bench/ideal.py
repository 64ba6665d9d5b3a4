"""Theoretical gain of early exit, from the costs of the phases of an iteration.

Let ``p_d`` be the fraction of tokens that exit after recursion ``d``, ``D = Σ (d + 1) p_d`` the mean number of
recursions per token, and ``R`` the number of recursions of the model. With the costs per token of entering (embedding
and prelude) ``c_in``, of one recursion ``c_b``, of exiting (coda, LM head, sampling) ``c_out`` and, with early exit, of
exit tests and the keys and values of skipped depths ``c_f``::

    G* = (c_in + R c_b + c_out) / (c_in + D c_b + c_f + c_out)

which is ``R / D`` without the other costs. ``G`` is the measured gain of the engine over itself at full depth, and
``η = G / G*`` its efficiency.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from recursify.engine import EngineStats

from .contestants import Runner
from .workload import Workload

PHASES = ("enter_seconds", "block_seconds", "test_seconds", "exit_seconds", "seconds")
"""Times in :class:`EngineStats`: the phases of an iteration, and the total."""


@dataclass(frozen=True)
class Costs:
    """Seconds per new token: ``c_in``, ``c_b``, ``c_out`` and ``c_f`` of the formula."""

    enter: float
    block: float
    leave: float
    skip: float = 0.0


@dataclass(frozen=True)
class Gain:
    """Gain of early exit over full depth, for new tokens after the first.

    Attributes:
        gain: Measured gain ``G``.
        ideal_gain: Theoretical gain ``G*``, if costs follow the number of rows.
        ideal_gain_per_call: Theoretical gain, if costs follow the number of calls.
        efficiency: Ratio ``η = G / G*``.
        recursions_of_new_tokens: Mean number of recursions per token.
        costs: Costs per token.
    """

    gain: float
    ideal_gain: float
    ideal_gain_per_call: float
    efficiency: float
    recursions_of_new_tokens: float
    costs: Costs

    def to_dict(self) -> dict[str, float]:
        """Return JSON-ready data, with the costs in milliseconds."""
        figures = asdict(self)
        return figures | {f"{name}_milliseconds": 1e3 * cost for name, cost in figures.pop("costs").items()}


def ideal_gain(costs: Costs, num_recursions: int, mean_recursions: float) -> float:
    """Compute ``G*`` of tokens that run ``mean_recursions`` instead of ``num_recursions``."""
    ends = costs.enter + costs.leave
    return (ends + num_recursions * costs.block) / (ends + mean_recursions * costs.block + costs.skip)


def ideal_gain_per_call(costs: Costs, num_recursions: int, mean_recursions: float) -> float:
    """Compute ``G*`` if a call costs the same for few rows as for many, as it does when reading weights dominates.

    At full depth, rows that start together need one call of prelude and coda, and ``R`` of the block. With early exit,
    every call of the block needs one of prelude and coda, for ``1 / D`` of the rows; below 1, lock-step batching wins::

        G*_call = (c_in + R c_b + c_out) / (D (c_in + c_b + c_out) + c_f)
    """
    ends = costs.enter + costs.leave
    return (ends + num_recursions * costs.block) / (mean_recursions * (ends + costs.block) + costs.skip)


def prompt_costs(run: Runner, workload: Workload, rounds: int) -> dict[str, float]:
    """Measure the seconds per phase for the prompts of ``workload`` alone, with one new token each."""
    runs = [run(workload.with_new_tokens(1)).stats for _ in range(rounds)]
    return {name: statistics.median(getattr(stats, name) for stats in runs) for name in PHASES}


def measure_gain(
    full: EngineStats, early: EngineStats, prompts: Mapping[str, float], num_requests: int, num_recursions: int
) -> Gain:
    """Compare an engine with early exit to the same engine at full depth.

    Args:
        full: Statistics at full depth, which give the costs of entering, exiting and a recursion.
        early: Statistics with early exit, which give the cost of skipping.
        prompts: Seconds per phase of the prompts with their first tokens.
        num_requests: Number of requests in a run.
        num_recursions: Number of recursions of the model.
    """
    tokens = max(1, full.new_tokens - num_requests)
    spent = {name: getattr(full, name) - prompts[name] for name in PHASES}
    between = spent["test_seconds"] / tokens
    rest = spent["seconds"] - sum(spent[name] for name in PHASES[:-1])
    costs = Costs(
        enter=(spent["enter_seconds"] + rest) / tokens,
        block=spent["block_seconds"] / (tokens * num_recursions),
        leave=spent["exit_seconds"] / tokens + between,
        skip=max(0.0, (early.test_seconds - prompts["test_seconds"]) / tokens - between),
    )
    recursions = (early.depth_sum - num_requests * num_recursions) / tokens
    gain = spent["seconds"] / (early.seconds - prompts["seconds"])
    ideal = ideal_gain(costs, num_recursions, recursions)
    per_call = ideal_gain_per_call(costs, num_recursions, recursions)
    return Gain(gain, ideal, per_call, gain / ideal, recursions, costs)
