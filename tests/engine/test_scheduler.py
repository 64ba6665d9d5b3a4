"""Scheduling: occupancy, prefixes, preemption and fairness."""

import torch

from helpers.small_engine import greedy, prompts, recursive, small_engine
from recursify.engine import Engine, SamplingParams


def test_slots_are_full_where_requests_wait():
    """A mixed workload with a full queue, beside rows that wait for the deepest of them."""
    model = recursive(recursions=4)
    generator = torch.Generator().manual_seed(0)
    occupancy = {}
    for lockstep in (False, True):
        engine = Engine(model, max_num_seqs=4, page_size=4, num_pages=256, lockstep=lockstep)
        for number in range(40):
            table = tuple(torch.randint(0, 4, (7,), generator=generator).tolist())
            new = 4 + 5 * number % 13
            engine.add(prompts(3 + number % 5)[0], SamplingParams(max_tokens=new, forced_depths=table))
        while engine.scheduler.waiting:
            engine.step()
        occupancy[lockstep] = engine.stats.occupancy
        while engine.has_work:
            engine.step()
    assert occupancy[False] >= 0.95
    assert occupancy[True] < 0.8


def test_prefixes_are_found():
    """A prompt with a cached prefix is computed from the end of the prefix, and generates the same."""
    model = recursive()
    shared = prompts(23)[0]
    engine = small_engine(model)
    first = engine.generate([[*shared, 7, 8]], SamplingParams(max_tokens=5))[0]
    second = engine.generate([[*shared, 9]], SamplingParams(max_tokens=5))[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 20)
    assert second.token_ids == greedy(model, [*shared, 9], 5)
    assert engine.generate([[*shared, 9]], SamplingParams(max_tokens=1))[0].cached_tokens == 20
    again = small_engine(model, enable_prefix_caching=False)
    again.generate([shared, shared], SamplingParams(max_tokens=5))
    assert again.stats.cached_tokens == 0


def test_an_answer_is_a_prefix():
    """Keys and values of answers at full depth are found too; of answers that left early only the prompt's are."""
    model = recursive()
    for forced, cached in ((None, 20), ((0,), 12)):
        engine = small_engine(model, kv="latest", force_kv=True)
        prompt = prompts(13)[0]
        output = engine.generate([prompt], SamplingParams(max_tokens=10, forced_depths=forced))[0]
        again = engine.generate([[*prompt, *output.token_ids]], SamplingParams(max_tokens=1))[0]
        assert again.cached_tokens == cached


def test_no_request_starves():
    """The oldest gets on however tight pages are, and all are answered in their turn."""
    model = recursive()
    engine = Engine(
        model, max_num_seqs=4, page_size=2, num_pages=12, chunk_size=3, max_num_batched_tokens=8, max_model_len=24
    )
    asked = prompts(*range(4, 14))
    outputs = engine.generate(asked, SamplingParams(max_tokens=10))
    assert engine.stats.preemptions > 0
    assert [output.token_ids for output in outputs] == [greedy(model, each, 10) for each in asked]
