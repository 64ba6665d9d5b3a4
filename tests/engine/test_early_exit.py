"""Early exits: heads, largest depths, and the keys and values of skipped depths."""

import pytest

from helpers.small_engine import greedy, prompts, recursive, small_engine
from recursify.engine import SamplingParams
from recursify.modeling import ExitSettings, make_policy


@pytest.mark.parametrize("head", ["shared", "norm", "low_rank", "full"])
@pytest.mark.parametrize("coda", [True, False])
def test_exit_heads(head, coda):
    """Every kind of exit head, with and without the coda, compared with the sequential decoder."""
    model = recursive(exit_head=head, exit_rank=4, exit_through_coda=coda, recursions=4, seed=3)
    exits = ExitSettings(make_policy("confidence", 0.05 if head == "full" else 0.1))
    asked = prompts(7, 12, 5)
    engine = small_engine(model, max_num_seqs=3)
    outputs = engine.generate(asked, SamplingParams(max_tokens=9, exit=exits))
    assert [output.token_ids for output in outputs] == [greedy(model, each, exit_policy=exits) for each in asked]
    assert len(engine.stats.exit_histogram) > 1


def test_largest_depth():
    """New tokens go no deeper than asked; the prompt does."""
    model = recursive(recursions=4)
    exits = ExitSettings(make_policy("fixed", 1.0))
    prompt = prompts(9)[0]
    output = small_engine(model).generate([prompt], SamplingParams(max_tokens=6, max_depth=1))[0]
    assert output.depths == [3, 1, 1, 1, 1, 1]
    assert output.token_ids == greedy(model, prompt, 6, exit_policy=exits)
    # A policy that reads out at every exit before, and stays: what it read there is not what is said here.
    never = ExitSettings(make_policy("confidence", 1.0))
    params = SamplingParams(max_tokens=6, max_depth=1, exit=never)
    engine = small_engine(model)
    assert engine.generate([prompt], params)[0].token_ids == output.token_ids
    engine.add(prompt, params)
    engine.step()
    (request,) = engine.requests.values()
    while engine.has_work:
        assert not request.deferred, "nothing waits for depths that no token will run"
        engine.step()


def test_waiting_tokens_are_bounded_below_the_largest_depth():
    """Only what waits counts against max_pending; with a largest depth no token ever runs the last recursion."""
    always = ExitSettings(make_policy("confidence", -1.0), max_pending=3)
    model = recursive(recursions=4)
    output = small_engine(model).generate(prompts(5), SamplingParams(max_tokens=14, max_depth=1, exit=always))[0]
    assert output.depths[0] == 3
    assert set(output.depths[1:]) == {0, 1}
    assert output.depths.count(0) > 2 * output.depths.count(1), "one in four catches the others up"


@pytest.mark.parametrize("kv", ["copied", "latest"])
def test_keys_that_exits_were_trained_for(kv):
    """A policy by its name has them, in the engine and in generate."""
    model = recursive(recursions=4, exit_head="shared", exit_kv=kv, seed=3)
    asked = prompts(7, 12, 5, 9, 15)
    engine = small_engine(model)
    assert engine.kv == kv
    model.config.exit_policy, model.config.exit_thresholds = "confidence", [0.1] * 3
    outputs = engine.generate(asked, SamplingParams(max_tokens=20, exit="confidence"))
    assert [output.token_ids for output in outputs] == [
        greedy(model, each, 20, exit_policy="confidence") for each in asked
    ]
    exact = ExitSettings(make_policy("confidence", 0.1))
    assert [output.token_ids for output in outputs] != [greedy(model, each, 20, exit_policy=exact) for each in asked]
