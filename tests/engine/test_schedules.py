"""Whatever happens to requests in the engine, each is answered as if it were alone."""

import pytest
from schedules import FAMILIES, run_schedule

MODES = ("deferred", "copied", "latest", "recursion_wise", "shared")
SCHEDULES = 50
"""Per family and mode: 1,000 in all."""


@pytest.mark.parametrize("kv", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_says_what_one_at_a_time_says(family, kv):
    """Tokens and depths, for random arrivals, limits, pages, chunks, preemptions, cancels, prefixes."""
    whole = preemptions = cached = 0
    depths: dict[int, int] = {}
    for seed in range(SCHEDULES):
        engine, answered = run_schedule(family, kv, seed)
        stats = engine.stats
        whole, preemptions, cached = whole + answered, preemptions + stats.preemptions, cached + stats.cached_tokens
        for depth, count in stats.exit_histogram.items():
            depths[depth] = depths.get(depth, 0) + count
    # The schedules are worth nothing if nothing happens in them.
    assert whole > 2 * SCHEDULES
    assert preemptions > SCHEDULES / 5
    assert cached > 0 or kv in ("recursion_wise", "shared")
    assert len(depths) > 1, "tokens leave after several depths"
