"""The engine: one request like generate, limits, counts, sampling, stopping, and what it refuses."""

import gc

import pytest
import torch

from helpers.schedules import model_of
from helpers.small_engine import assert_same_as_generate, greedy, prompts, recursive, small_engine
from helpers.tiny_models import byte_tokenizer, tiny_dense
from helpers.tolerances import LOGITS
from recursify.engine import Engine, SamplingParams
from recursify.errors import EngineError, UnsupportedModelError
from recursify.experiments.adaptive_thresholds import AdaptiveThresholds
from recursify.modeling import (
    ExitSettings,
    make_policy,
)

# --- Models --------------------------------------------------------------------------------------------------------


def test_recursive_models_of_all_families(family):
    """Prompts of several chunks, more of them than run at once, at full depth."""
    assert_same_as_generate(recursive(family), 3, 17, 9, 6, max_num_seqs=3)


def test_dense_models_of_all_families(family):
    """A dense model is one recursion of the same engine: the control."""
    engine = assert_same_as_generate(tiny_dense(family), 3, 17, 9, 6, max_num_seqs=3)
    assert engine.stats.mean_recursions == 1


def test_mixed_depths_in_all_families(family):
    """Forced exits put rows of all depths into one call; a batch generates what its requests generate alone."""
    model = recursive(family)
    asked = prompts(5, 11, 4)
    params = [SamplingParams(max_tokens=9, forced_depths=table) for table in ((0, 1), (1, 0, 0), (1,))]
    together = small_engine(model, max_num_seqs=3).generate(asked, params)
    alone = [Engine(model, max_num_seqs=1).generate([each], its)[0] for each, its in zip(asked, params, strict=True)]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.depths for output in together] == [output.depths for output in alone]
    assert together[0].depths == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_depths_without_rotation():
    """SmolLM3 with a block whose layers rotate at one depth and not at another."""
    dense = {"no_rope_layers": [1, 1, 0, 0, 1, 1]}
    model = recursive("smollm3", recursions=2, dense=dense)
    assert len({view.self_attn.use_rope for view in model.model.block[0].views}) == 2
    assert_same_as_generate(model, 7, 12, max_num_seqs=2)


@pytest.mark.parametrize("fields", [{"sharing": "sequence"}, {"lora_rank": 0}, {"tie_norms": True}])
def test_other_models(fields):
    """Sequence sharing, which has no boundary, is one recursion; no residuals; tied norms."""
    model = recursive(recursions=2, **fields)
    assert_same_as_generate(model, 7, 12, max_num_seqs=2)


def test_another_number_of_recursions():
    """Scaled steps are hooks of the family's layers, which the engine's layers keep."""
    model = recursive().with_recursions(3)
    assert model.config.residual_scale != 1
    assert_same_as_generate(model, 7, 12, max_num_seqs=2)


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


def test_bfloat16():
    """Rows of both depths in one call; log-probabilities are the model's, as far as sums in another order let them."""
    model = recursive().bfloat16()
    outputs = small_engine(model).generate(prompts(7, 12), SamplingParams(max_tokens=9, logprobs=0))
    for prompt, output in zip(prompts(7, 12), outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1)
        for row, token, found in zip(expected, output.token_ids, output.logprobs, strict=True):
            assert found == {token: pytest.approx(float(row[token]), abs=LOGITS[torch.bfloat16])}


def test_model_is_as_it_was():
    """The engine's attention is the layers' own only while it runs."""
    model = recursive()
    engine = small_engine(model)
    before, keys = greedy(model, prompts(7)[0]), set(model.state_dict())
    engine.generate(prompts(7), SamplingParams(max_tokens=3))
    assert model.config._attn_implementation == "sdpa"
    assert set(model.state_dict()) == keys
    assert greedy(model, prompts(7)[0]) == before


def test_layers_that_differ_are_refused_by_name():
    """A layer that is not the same at all depths cannot be one call."""
    model = recursive()
    model.model.block[0].views[1].self_attn.scaling = 0.5
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of the shared block.*'self_attn.scaling' is .* and 0.5"):
        Engine(model)


def test_models_that_do_more_are_refused():
    """What a model does outside its layers is found when logits are compared."""
    model = tiny_dense("llama")
    model.model.register_forward_hook(
        lambda module, inputs, output: setattr(output, "last_hidden_state", 2 * output[0]) or output
    )
    with pytest.raises(UnsupportedModelError, match="does not reproduce this llama model"):
        Engine(model)


def test_models_that_cannot_run_are_refused():
    """Mixed loops, and a model set to one exit."""
    model = recursive(lora_rank=0, tie_norms=True)
    with pytest.raises(UnsupportedModelError, match=r"mixes loops \(anderson=1\)"):
        Engine(model.with_recursions(4, anderson=1))
    model = recursive()
    model.config.exit_depth = 0
    with pytest.raises(UnsupportedModelError, match="exit after depth 0 always"):
        Engine(model)


# --- Counts --------------------------------------------------------------------------------------------------------


def test_exits_at_the_first_depth_halve_the_calls():
    """Equal slots, two recursions: tokens that leave after the first take half the block calls."""
    model = recursive()
    asked = prompts(4, 4, 4, 4)
    calls = []
    for depth in (0, 1):
        engine = Engine(model, max_num_seqs=4, page_size=4, num_pages=64)
        engine.generate(asked, SamplingParams(max_tokens=1))
        engine.reset_stats()
        engine.generate(asked, SamplingParams(max_tokens=21, forced_depths=(depth,)))
        calls.append(engine.stats.block_calls - 2)  # the prompts run both recursions
    assert calls == [20, 40]


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


def test_fetches():
    """Nothing is copied per row: decisions once per iteration, and with async_output the tokens with them."""
    model = recursive(exit_head="shared", recursions=4)
    leaves = SamplingParams(max_tokens=20, exit=ExitSettings(make_policy("head", 0.5)))
    for late, most in ((False, 2), (True, 1)):
        engine = Engine(model, max_num_seqs=4, page_size=4, num_pages=64, async_output=late)
        outputs = engine.generate(prompts(4, 5, 6, 7), leaves)
        assert engine.stats.fetches <= most * engine.stats.iterations
        assert len(engine.stats.exit_histogram) > 1
        assert [output.token_ids for output in outputs] == [
            greedy(model, each, 20, exit_policy=leaves.exit) for each in prompts(4, 5, 6, 7)
        ]
        engine.reset_stats()
        engine.generate(prompts(4, 5, 6, 7), SamplingParams(max_tokens=20))
        assert engine.stats.fetches <= engine.stats.iterations


def test_async_output_stops_in_time():
    """A token started after the last one is dropped; stop tokens, stop strings and lengths end requests as without."""
    model, tokenizer = recursive(), byte_tokenizer()
    whole = small_engine(model, tokenizer).generate(["Once upon"], SamplingParams(max_tokens=30))[0]
    params = [
        SamplingParams(max_tokens=30, stop_token_ids=(whole.token_ids[4],)),
        SamplingParams(max_tokens=30, stop=(whole.text[6:8],)),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=30, logprobs=1),
    ]
    for late in (False, True):
        engine = small_engine(model, tokenizer, async_output=late)
        outputs = engine.generate(["Once upon"] * 4, params)
        lengths = [len(output.token_ids) for output in outputs]
        assert lengths == [whole.token_ids.index(whole.token_ids[4]) + 1, lengths[1], 1, 30]
        assert [output.token_ids for output in outputs] == [whole.token_ids[:length] for length in lengths]
        assert outputs[1].text == whole.text[: whole.text.index(whole.text[6:8])]
        assert engine.kv_cache.num_used == 0
        assert not engine.has_work


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


def test_memory_of_routed_models():
    """A routed model's deeper pages are fewer, by its capacities; with shared keys there are none."""
    sizes = {}
    for kv in ("deferred", "recursion_wise", "shared"):
        model = recursive(recursions=3, ends=0)
        if kv != "deferred":
            model.add_routers("expert_choice", router_kv=kv)
        sizes[kv] = Engine(model, num_pages=1000, page_size=4, max_model_len=64).kv_cache.num_bytes
    assert sizes["shared"] / sizes["deferred"] == pytest.approx(1 / 3)
    assert sizes["recursion_wise"] / sizes["deferred"] == pytest.approx((1 + 1.1 * 2 / 3 + 1.1 / 3) / 3, rel=1e-2)


# --- Sampling ------------------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_the_batch():
    """A seed names an answer, whatever else runs."""
    model = recursive()
    asked = prompts(5, 9, 4)
    params = [SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, top_k=50, seed=number) for number in range(3)]
    together = small_engine(model, max_num_seqs=3).generate(asked, params)
    alone = [Engine(model).generate([each], its)[0] for each, its in zip(asked, params, strict=True)]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    other = Engine(model).generate(asked[:1], SamplingParams(max_tokens=8, temperature=1.0, seed=99))[0]
    assert other.token_ids != alone[0].token_ids


def test_sampling_follows_its_distribution():
    """Frequencies of 2,000 draws beside the probabilities, within top-k, top-p and temperature."""
    from recursify.engine.request import Request
    from recursify.engine.sampler import sample

    logits = torch.log(torch.tensor([[0.05, 0.4, 0.3, 0.2, 0.05]])).expand(2000, 5)
    cases = {
        (0, 1.0): [0.05, 0.4, 0.3, 0.2, 0.05],
        (2, 1.0): [0, 4 / 7, 3 / 7, 0, 0],
        (0, 0.75): [0, 4 / 9, 3 / 9, 2 / 9, 0],
    }
    for (top_k, top_p), expected in cases.items():
        params = [SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed) for seed in range(2000)]
        drawn = sample(logits, [Request([1], its, None, 1) for its in params])
        frequencies = torch.bincount(drawn, minlength=5) / 2000
        torch.testing.assert_close(frequencies, torch.tensor(expected), atol=0.04, rtol=0)
    hot = [Request([1], SamplingParams(temperature=100.0, seed=seed), None, 1) for seed in range(2000)]
    torch.testing.assert_close(
        torch.bincount(sample(logits, hot), minlength=5) / 2000, torch.full((5,), 0.2), atol=0.04, rtol=0
    )


def test_draws_are_the_requests_own():
    """Nothing is drawn from the user's generator, nor is it seeded; a tiny temperature is greedy."""
    model = recursive()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    engine = small_engine(model)
    engine.generate(prompts(5), SamplingParams(max_tokens=3, temperature=1.0))
    torch.testing.assert_close(torch.cat([first, torch.rand(1)]), expected, atol=0, rtol=0)
    for temperature in (1e-46, 1e-39, 1e-6):
        output = engine.generate(prompts(5), SamplingParams(max_tokens=5, temperature=temperature))[0]
        assert output.token_ids == greedy(model, prompts(5)[0], 5)


def test_log_probabilities():
    """Those of the model, of the first choices and of what was chosen."""
    model = recursive()
    prompt = prompts(6)[0]
    params = SamplingParams(max_tokens=4, logprobs=3, temperature=2.0, seed=1)
    output = small_engine(model).generate([prompt, prompts(8)[0]], [params, SamplingParams(max_tokens=4)])[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for row, token, found in zip(expected, output.token_ids, output.logprobs, strict=True):
        best = row.topk(3).indices.tolist()
        assert set(found) == {*best, token}
        for each, value in found.items():
            assert value == pytest.approx(float(row[each]), abs=1e-4)


def test_stop_strings_and_tokens():
    """A stop string ends the text before it; a stop token ends it; both give pages back."""
    model, tokenizer = recursive(), byte_tokenizer()
    engine = small_engine(model, tokenizer)
    whole = engine.generate(["Once upon"], SamplingParams(max_tokens=30))[0]
    assert whole.finish_reason == "length"
    assert whole.text == tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    text = whole.text.encode("ascii", "ignore").decode()
    stop = text[5:7]
    stopped = engine.generate(["Once upon"], SamplingParams(max_tokens=30, stop=("never said", stop)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    token = whole.token_ids[4]
    ended = engine.generate(["Once upon"], SamplingParams(max_tokens=30, stop_token_ids=(token,)))[0]
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    model.generation_config.eos_token_id = [token]
    engine = small_engine(model, tokenizer)
    assert engine.generate(["Once upon"], SamplingParams(max_tokens=30))[0].token_ids == ended.token_ids
    ignored = engine.generate(["Once upon"], SamplingParams(max_tokens=30, ignore_eos=True))[0]
    assert ignored.token_ids == whole.token_ids
    assert engine.kv_cache.num_used == 0


def test_tokens_come_one_by_one():
    """The callback is called for every token, and at the end."""
    heard: dict[int, list[tuple[int, str | None]]] = {}
    engine = small_engine(
        recursive(),
        on_token=lambda output: heard.setdefault(output.request_id, []).append(
            (len(output.token_ids), output.finish_reason)
        ),
    )
    outputs = engine.generate(prompts(4, 9), SamplingParams(max_tokens=3))
    assert [heard[output.request_id] for output in outputs] == [[(1, None), (2, None), (3, "length")]] * 2


# --- Cancelling, and what is refused -------------------------------------------------------------------------------


def test_cancel_before_during_and_after():
    """A request can be cancelled at any time, also in the middle of the depths; others go on."""
    model = recursive(recursions=4)
    engine = small_engine(model, max_num_seqs=2)
    asked = prompts(5, 9, 4)
    ids = [engine.add(each, SamplingParams(max_tokens=6)) for each in asked]
    outputs = [engine.requests[each].output for each in ids]
    engine.cancel(ids[2])
    assert outputs[2].finish_reason == "cancelled"
    engine.step()
    assert engine.scheduler.chunks[ids[0]].depth == 1
    engine.cancel(ids[0])
    while engine.has_work:
        engine.step()
    assert [output.finish_reason for output in outputs] == ["cancelled", "length", "cancelled"]
    assert outputs[1].token_ids == greedy(model, asked[1], 6)
    assert not engine.cancel(ids[1]), "it is answered already"
    assert not engine.cancel(10**9)
    assert engine.kv_cache.num_used == 0
    engine.step()  # with nothing to do


def test_requests_that_cannot_be_answered():
    """An error at once, and never a request that hangs."""
    engine = Engine(recursive(), byte_tokenizer(), page_size=4, num_pages=6, max_model_len=64)
    with pytest.raises(EngineError, match="40 tokens and max_tokens is 30: together more than the 64"):
        engine.add(prompts(40)[0], SamplingParams(max_tokens=30))
    with pytest.raises(EngineError, match=r"needs 8 pages for 30 tokens, and the engine has 6"):
        engine.add(prompts(20)[0], SamplingParams(max_tokens=10))
    with pytest.raises(EngineError, match="no tokens"):
        engine.add([])
    with pytest.raises(EngineError, match="Token 1000 of the prompt is not in the vocabulary of 260"):
        engine.add([1, 1000])
    with pytest.raises(EngineError, match="is text or a list of token ids: invalid literal"):
        engine.add(["a"])
    with pytest.raises(EngineError, match="needs exit heads, and the model has none"):
        engine.add([1], SamplingParams(exit="head"))
    with pytest.raises(EngineError, match="'oracle' is a simulation"):
        engine.add([1], SamplingParams(exit="oracle"))
    with pytest.raises(EngineError, match="Unknown exit policy 'sometimes'"):
        engine.add([1], SamplingParams(exit="sometimes"))
    with pytest.raises(EngineError, match="exit settings have kv 'copied', and the engine 'deferred'"):
        engine.add([1], SamplingParams(exit=ExitSettings(make_policy("confidence"), kv="copied")))
    learned = ExitSettings(make_policy("confidence"), adapt=AdaptiveThresholds(0.9))
    with pytest.raises(EngineError, match=r"exits after recursions only.*Leave layers and adapt out"):
        engine.add([1], SamplingParams(exit=learned))
    with pytest.raises(EngineError, match="There is no exit after depth 3"):
        engine.add([1], SamplingParams(exit=ExitSettings(make_policy("fixed", 3))))
    with pytest.raises(EngineError, match="2 prompts and 1 params"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(EngineError, match="no tokens"):
        engine.generate([[1], []], SamplingParams(max_tokens=4))
    assert not engine.has_work, "the first of the two was taken back"


def test_requests_without_a_tokenizer():
    engine = small_engine(recursive())
    with pytest.raises(EngineError, match="text prompt needs a tokenizer"):
        engine.add("Once")
    with pytest.raises(EngineError, match="Stop strings need a tokenizer"):
        engine.add([1], SamplingParams(stop=("x",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"logprobs": 21}, "logprobs must be a whole number of at least 0 and at most 20, got 21"),
        ({"max_depth": -1}, "max_depth must be a whole number of at least 0, got -1"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number of at least 1, got 2.5"),
        (
            {"seed": 2**70},
            "seed must be a whole number of at least 0 and at most 9223372036854775807, got 1180591620717411303424",
        ),
        ({"seed": "x"}, "seed must be a whole number of at least 0 and at most .*, got 'x'"),
        (
            {"stop_token_ids": 5},
            "stop_token_ids must be a list whose entries are each a whole number of at least 0, got 5",
        ),
        (
            {"forced_depths": (-3,)},
            "forced_depths must be a list whose entries are each a whole number of at least 0, got -3",
        ),
        ({"forced_depths": (0,), "max_depth": 1}, "forced_depths take the place of exit and max_depth"),
        ({"stop": "x"}, "stop must be a list whose entries are each a non-empty string, got 'x'"),
        ({"stop": ("",)}, "stop must be a list whose entries are each a non-empty string, got ''"),
        ({"max_tokens": True}, "max_tokens must be a whole number of at least 1, got True"),
        ({"max_token": 3}, "Unknown setting 'max_token'. Did you mean 'max_tokens'"),
        ({"forced_depths": ()}, "name at least one depth"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, got nan"),
    ],
)
def test_sampling_values_out_of_range(values, message):
    with pytest.raises(EngineError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number of at least 1, got 0"),
        ({"kv_cache_memory_bytes": 100}, "100 bytes of KV cache are too few: one page of 16 tokens takes"),
        ({"kv": "best"}, "Unknown kv 'best'. Use one of: deferred"),
        ({"kv": "copied"}, "was trained with 'deferred' keys and values; with 'copied' early exits change its output"),
        ({"kv": "shared", "force_kv": True}, "does not support kv 'shared', only its own 'deferred'"),
    ],
)
def test_engines_that_cannot_be(arguments, message):
    with pytest.raises(EngineError, match=message):
        Engine(recursive(), **arguments)


def test_modes_of_routed_models():
    """Routers say how far a token goes, and with which keys."""
    model = model_of("llama", "recursion_wise")
    with pytest.raises(EngineError, match="does not support kv 'shared', only its own 'recursion_wise'"):
        Engine(model, kv="shared", force_kv=True)
    engine = small_engine(model)
    with pytest.raises(EngineError, match="has routers, which decide how far a token goes"):
        engine.add([1], SamplingParams(max_depth=0))
    with pytest.raises(EngineError, match="has no exits"):
        small_engine(tiny_dense("llama")).add([1], SamplingParams(exit="confidence"))


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


def test_a_failing_callback_loses_nothing():
    """Its error comes out of step, and the others' tokens are theirs."""
    engine, heard = small_engine(recursive()), []

    def hear(output) -> None:
        heard.append(output.request_id)
        if len(heard) == 1:
            raise RuntimeError("deaf")

    engine.on_token = hear
    asked = [engine.add(each, SamplingParams(max_tokens=5)) for each in prompts(4, 5, 6)]
    outputs = [engine.requests[each].output for each in asked]

    def finish() -> None:
        while engine.has_work:
            engine.step()

    with pytest.raises(RuntimeError, match="deaf"):
        finish()
    finish()
    assert [output.token_ids for output in outputs] == [greedy(engine.model, each, 5) for each in prompts(4, 5, 6)]
    assert engine.kv_cache.num_used == 0


def test_callbacks_may_add_and_cancel():
    """A request that is cancelled while its token is told, and one that is asked then."""
    engine, outputs = small_engine(recursive()), []

    def hear(output) -> None:
        if len(output.token_ids) == 2 and output.finish_reason is None and len(outputs) < 3:
            engine.cancel(output.request_id)
            outputs.append(engine.requests[engine.add(prompts(7)[0], SamplingParams(max_tokens=4))].output)

    engine.on_token = hear
    engine.generate(prompts(4, 5), SamplingParams(max_tokens=6))
    while engine.has_work:
        engine.step()
    assert len(outputs) == 3
    assert outputs[-1].token_ids == greedy(engine.model, prompts(7)[0], 4)
    assert engine.kv_cache.num_used == 0


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


def test_soak():
    """Many short requests with cancels: pages and memory come back, every request is answered."""
    model = recursive(exit_head="shared")
    engine = Engine(model, max_num_seqs=8, page_size=4, num_pages=48, max_model_len=48)
    draw = torch.Generator().manual_seed(0)
    answered = 0
    live: list[int] = []
    counts = []

    def heard(output) -> None:
        nonlocal answered
        answered += output.finished

    engine.on_token = heard
    for number in range(400):
        length, new, cancel = torch.randint(1, 12, (3,), generator=draw).tolist()
        exits = ExitSettings(make_policy("confidence", 0.1)) if number % 3 else None
        live.append(engine.add(prompts(length)[0], SamplingParams(max_tokens=new, exit=exits)))
        if cancel < 3:
            engine.cancel(live[int(torch.randint(0, len(live), (1,), generator=draw))])
        while len(engine.requests) > 12:
            engine.step()
        if number in (100, 399):
            gc.collect()
            counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    while engine.has_work:
        engine.step()
    assert answered == 400
    assert engine.kv_cache.num_used == 0
    assert not engine.requests
    assert not engine.scheduler.chunks
    assert counts[1] <= counts[0] + 100, "tensors pile up"
