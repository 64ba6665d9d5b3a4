"""Theoretical gain of early exit, by hand and by the figures of the study that the formula comes from."""

import pytest

from recursify.bench.ideal import Costs, ideal_gain, ideal_gain_per_call, measure_gain
from recursify.bench.workload import ForcedExits, Workload
from recursify.engine import EngineStats
from recursify.errors import EngineError


def test_free_ends():
    """With free ends and skips the gain is R / D: 3 / 1.7."""
    assert ideal_gain(Costs(0, 1, 0), 3, 1.7) == pytest.approx(3 / 1.7)
    assert ideal_gain_per_call(Costs(0, 1, 0), 3, 1.7) == pytest.approx(3 / 1.7)


def test_ends_by_hand():
    costs = Costs(enter=1, block=2, leave=3, skip=0.5)
    assert ideal_gain(costs, 3, 1.5) == pytest.approx((1 + 6 + 3) / (1 + 3 + 3 + 0.5))
    assert ideal_gain_per_call(costs, 3, 1.5) == pytest.approx((1 + 6 + 3) / (1.5 * 6 + 0.5))


def test_tables():
    exits = ForcedExits.draw((0.5, 0.3, 0.2), 100)
    assert [exits.table.count(depth) for depth in range(3)] == [50, 30, 20]
    assert exits.mean_recursions == pytest.approx(1.7)
    assert exits != ForcedExits.draw((0.5, 0.3, 0.2), 100, seed=1)
    workload = Workload([[1]] * 2, [5, 5], 2, 8)
    first, second = (exits.params(workload, number)["forced_depths"] for number in range(2))
    assert (first, second) == (exits.table, exits.table[31:] + exits.table[:31])
    with pytest.raises(EngineError, match=r"must add up to 1, got \[0.5, 0.2\]"):
        ForcedExits.draw((0.5, 0.2), 10)


def test_efficiency_by_hand():
    """Two runs of 10 requests and 110 tokens, prompts with their first tokens taken off."""
    phases = {"enter_seconds": 2.0, "block_seconds": 8.0, "test_seconds": 0.0, "exit_seconds": 3.0, "seconds": 13.0}
    prompts = {"enter_seconds": 1.0, "block_seconds": 4.0, "test_seconds": 0.0, "exit_seconds": 1.0, "seconds": 6.0}
    full = EngineStats(**phases, new_tokens=110, depth_sum=220)
    early = EngineStats(**{**phases, "block_seconds": 6.0, "seconds": 11.0}, new_tokens=110, depth_sum=20 + 150)
    gain = measure_gain(full, early, prompts, 10, 2)
    assert gain.recursions_of_new_tokens == pytest.approx(1.5)
    assert gain.gain == pytest.approx(7 / 5)
    assert gain.ideal_gain == pytest.approx((1 + 4 + 2) / (1 + 3 + 2))
    assert gain.efficiency == pytest.approx(7 / 5 / (7 / 6))
