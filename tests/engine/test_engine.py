"""The engine's steps: counts, copies to the host, stopping, callbacks, cancelling, and a soak."""

import gc

import pytest
import torch

from helpers.small_engine import greedy, prompts, recursive, small_engine
from helpers.tiny_models import byte_tokenizer
from recursify.engine import Engine, SamplingParams
from recursify.modeling import ExitSettings, make_policy

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


# --- Stopping and callbacks ----------------------------------------------------------------------------------------


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


# --- Cancelling ----------------------------------------------------------------------------------------------------


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
