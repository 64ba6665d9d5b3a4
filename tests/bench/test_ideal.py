"""What leaving early can gain, by hand and by the figures of the study that the formula comes from."""

import pytest

from recursify.bench.contestants import efficiency, forced_table
from recursify.bench.ideal import Costs, ideal_gain, ideal_gain_per_call, mean_recursions, synchronous_recursions
from recursify.errors import EngineError

PARTS = {0: 0.5, 1: 0.3, 2: 0.2}


def test_free_ends():
    """With free ends and skips the gain is R / D: 3 / 1.7."""
    assert mean_recursions(PARTS) == pytest.approx(1.7)
    assert ideal_gain(Costs(0, 1, 0), 3, 1.7) == pytest.approx(3 / 1.7)
    assert ideal_gain_per_call(Costs(0, 1, 0), 3, 1.7) == pytest.approx(3 / 1.7)


def test_ends_by_hand():
    costs = Costs(enter=1, block=2, leave=3, skip=0.5)
    assert ideal_gain(costs, 3, 1.5) == pytest.approx((1 + 6 + 3) / (1 + 3 + 3 + 0.5))
    assert ideal_gain_per_call(costs, 3, 1.5) == pytest.approx((1 + 6 + 3) / (1.5 * 6 + 0.5))


def test_rows_that_wait_for_one_another():
    """E[max]: 2.83 of 3 recursions where eight rows wait for the deepest."""
    assert synchronous_recursions(PARTS, 1) == pytest.approx(1.7)
    assert synchronous_recursions(PARTS, 8) == pytest.approx(2.83, abs=0.005)
    assert synchronous_recursions(PARTS, 1000) == pytest.approx(3)


def test_tables():
    table = forced_table((0.5, 0.3, 0.2), 100, seed=0)
    assert [table.count(depth) for depth in range(3)] == [50, 30, 20]
    assert table != forced_table((0.5, 0.3, 0.2), 100, seed=1)
    with pytest.raises(EngineError, match=r"must add up to 1, got \[0.5, 0.2\]"):
        forced_table((0.5, 0.2), 10, seed=0)


def test_efficiency_by_hand():
    """Two runs of 10 requests and 110 tokens, prompts with their first tokens taken off."""
    phases = {"enter_seconds": 2.0, "block_seconds": 8.0, "test_seconds": 0.0, "exit_seconds": 3.0, "seconds": 13.0}
    prompts = {"enter_seconds": 1.0, "block_seconds": 4.0, "test_seconds": 0.0, "exit_seconds": 1.0, "seconds": 6.0}
    full = {**phases, "new_tokens": 110, "recursions": 220}
    row = {**phases, "block_seconds": 6.0, "seconds": 11.0, "new_tokens": 110, "recursions": 20 + 150}
    found = efficiency(full, row, prompts, 10, 2)
    assert found["recursions_of_new_tokens"] == pytest.approx(1.5)
    assert found["gain"] == pytest.approx(7 / 5)
    assert found["ideal_gain"] == pytest.approx((1 + 4 + 2) / (1 + 3 + 2))
    assert found["efficiency"] == pytest.approx(7 / 5 / (7 / 6))
