"""Random schedules: every request generates what it generates alone."""

import pytest

from helpers.schedules import FAMILIES, NEW_TOKENS, NUM_SETTINGS, expected, model_of, prompt, run_schedule, settings
from recursify.engine import Engine, SamplingParams
from recursify.engine.layers.batch import AttentionBatch

MODES = ("deferred", "copied", "latest", "recursion_wise", "shared")
SCHEDULES = 50
"""Per family and mode: 1,000 in all."""


@pytest.mark.parametrize("kv", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_schedules_generate_what_single_requests_generate(family, kv):
    """Tokens and depths, for random arrivals, limits, pages, chunks, preemptions, cancels, prefixes."""
    whole = preemptions = cached = 0
    depths: dict[int, int] = {}
    for seed in range(SCHEDULES):
        engine, answered = run_schedule(family, kv, seed)
        stats = engine.stats
        whole, preemptions, cached = whole + answered, preemptions + stats.preemptions, cached + stats.cached_tokens
        for depth, count in stats.exit_histogram.items():
            depths[depth] = depths.get(depth, 0) + count
    # The schedules are worth nothing without preemptions, exits and cached prefixes.
    assert whole > 2 * SCHEDULES
    assert preemptions > SCHEDULES / 10
    assert cached > 0 or kv in ("recursion_wise", "shared")
    assert len(depths) > 1, "tokens exit after several depths"


@pytest.mark.parametrize(("kv", "loop"), [*((kv, False) for kv in MODES), ("deferred", True), ("latest", True)])
def test_preemption_at_any_moment(kv, loop, monkeypatch):
    """Tokens computed again after a preemption exit after the same depths, also if it happens between recursions.

    No two rows of a call write to one KV slot: on a GPU the order of the writes is undefined.
    """
    store = AttentionBatch.store

    def checked(self, layer, key, value):
        assert len(self.slots.unique()) == len(self.slots)
        store(self, layer, key, value)

    monkeypatch.setattr(AttentionBatch, "store", checked)
    model, which = model_of("llama", kv), 2
    for how in range(NUM_SETTINGS):
        for moment in range(3, 22):
            sizes = {"max_num_seqs": 1, "page_size": 4, "num_pages": 16, "chunk_size": 5, "max_model_len": 64}
            engine = Engine(model, kv=kv, force_kv=True, device_loop=loop, num_device_steps=1, **sizes)
            asked = engine.add(prompt(which), SamplingParams(max_tokens=NEW_TOKENS, exit=settings(how, "llama", kv)))
            request = engine.requests[asked]
            for _ in range(moment):
                engine.step()
            if request.finished:
                break
            engine.scheduler.preempt(request)
            while engine.has_work:
                engine.step()
            found = request.output.token_ids, request.output.depths
            assert found == expected("llama", kv, which, how), (how, moment)
