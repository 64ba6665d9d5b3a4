"""The device loop generates the tokens that the host loop does, and never syncs within an iteration."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import subprocess
import sys

import pytest
import torch

from helpers import python_path
from helpers.schedules import FAMILIES, expected, model_of, prompt, settings
from helpers.tiny_models import byte_tokenizer, random_ids, tiny_dense
from recursify.engine import Engine, SamplingParams, checks
from recursify.engine.device_loop.cuda_graphs import CudaGraphs
from recursify.engine.device_loop.loop import DeviceLoop
from recursify.engine.device_loop.slots import LoopShape
from recursify.engine.layers.decoder import adapt_decoder
from recursify.engine.layers.kv_cache import KVCache
from recursify.engine.layers.model_runner import ModelRunner
from recursify.errors import EngineError
from recursify.modeling import ExitSettings, make_policy

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
KV = ("deferred", "copied", "latest")


def prompts(count: int, *, shortest: int = 3) -> list[list[int]]:
    """Prompts of different lengths."""
    return [random_ids(1, shortest + 2 * number % 7, seed=number)[0].tolist() for number in range(count)]


def engines(family: str, kv: str, device: str = "cpu", **options):
    """One engine with the device loop, and one without."""
    model = model_of(family, kv)
    if device != "cpu":
        model = copy.deepcopy(model).to(device)
    arguments = {"kv": kv, "force_kv": True, "max_model_len": 64, "page_size": 4, **options}
    return [Engine(model, **arguments, device_loop=loop, implementation="reference") for loop in (True, False)]


def compared(outputs) -> list:
    """Parts of the outputs that are compared."""
    return [(output.token_ids, output.depths, output.finish_reason) for output in outputs]


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [0, 1, 3])
def test_more_rows_than_there_is_room_for(family, kv, how, monkeypatch):
    """Prelude and coda have fewer rows than needed: tokens that wait for an iteration stay the same."""
    monkeypatch.setattr("recursify.engine.device_loop.slot_manager.HEADROOM", 0.5)
    loop, plain = engines(family, kv, max_num_seqs=16, num_pages=300, num_device_steps=3)
    prompt_ids, params = prompts(20), SamplingParams(max_tokens=9, exit=settings(how, family, kv), ignore_eos=True)
    assert compared(loop.generate(prompt_ids, params)) == compared(plain.generate(prompt_ids, params))
    assert (loop.stats.loop_waits > 0) == (how > 0), "without early exits all slots run together"
    assert loop.stats.exit_histogram == plain.stats.exit_histogram
    assert loop.kv_cache.num_used == 0


def test_no_slot_starves():
    """Slots take turns where there are rows for only one of them, and none waits for long."""
    model = model_of("llama", "deferred")
    exits = ExitSettings(make_policy("fixed", 0.0), max_pending=3)
    loop, plain = engines("llama", "deferred", max_num_seqs=8, num_pages=200, num_device_steps=1)
    params = SamplingParams(max_tokens=24, exit=exits, ignore_eos=True)
    expected_answers = plain.generate(prompts(8), params)
    choose_shape = loop.slot_manager._choose_shape

    def narrow(recursions: float) -> LoopShape:
        shape = choose_shape(recursions)
        return LoopShape(shape.num_slots, 2, 8, 8, shape.exits_early)

    loop.slot_manager._choose_shape = narrow
    ids = [loop.add(prompt, params) for prompt in prompts(8)]
    requests = [loop.requests[each] for each in ids]
    while loop.has_work:
        loop.step()
        counts = [request.num_new for request in requests if not request.finished and request.num_new]
        assert max(counts, default=0) - min(counts, default=0) < 8
    assert compared([request.output for request in requests]) == compared(expected_answers)
    assert loop.stats.loop_waits > 50
    assert max(max(output.depths) for output in expected_answers) == model.config.num_recursions - 1


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("forced", [(0,), (2, 0, 1), (0, 0, 2), (1, 1, 1, 2)])
def test_forced_depths(kv, forced):
    """Deferred tokens wait for one that runs all recursions; if there is never one, the loop does not admit them."""
    loop, plain = engines("llama", kv, max_num_seqs=5, num_pages=200)
    params = SamplingParams(max_tokens=12, forced_depths=forced, ignore_eos=True)
    outputs = loop.generate(prompts(7), params)
    assert compared(outputs) == compared(plain.generate(prompts(7), params))
    assert outputs[0].depths[1:4] == [forced[number % len(forced)] for number in range(3)]
    assert (loop.stats.loop_iterations > 0) == (kv != "deferred" or 2 in forced)


@pytest.mark.parametrize("max_depth", [0, 1, 2, None])
@pytest.mark.parametrize("max_pending", [1, 2, 5])
def test_deferred_tokens_are_bounded(max_pending, max_depth):
    """No more than ``max_pending`` tokens wait for the deepest recursion that the request may run."""
    exits = ExitSettings(make_policy("fixed", 0.0), max_pending=max_pending)
    loop, plain = engines("llama", "deferred", max_num_seqs=3, num_pages=200)
    params = SamplingParams(max_tokens=16, exit=exits, max_depth=max_depth, ignore_eos=True)
    outputs = plain.generate(prompts(4), params)
    assert compared(loop.generate(prompts(4), params)) == compared(outputs)
    deepest = 2 if max_depth is None else max_depth
    assert outputs[0].depths[1:] == (([0] * max_pending + [deepest]) * 8)[:15]
    assert loop.stats.loop_iterations > 0


@pytest.mark.parametrize("kv", KV)
def test_requests_of_all_kinds_at_once(kv):
    """Every request follows its own settings; those that the device cannot decide run alongside."""
    kinds = [
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=12, exit=settings(3, "llama", kv)),
        SamplingParams(max_tokens=7, max_depth=1),
        SamplingParams(max_tokens=11, exit=settings(3, "llama", kv), max_depth=1),
        SamplingParams(max_tokens=8, exit=settings(1, "llama", kv)),  # another policy than that of the first request
        SamplingParams(max_tokens=8, temperature=0.7, seed=3),
        SamplingParams(max_tokens=9, exit=settings(1, "llama", kv), temperature=0.7, seed=5),
        SamplingParams(max_tokens=8, logprobs=2),
        SamplingParams(max_tokens=10, forced_depths=(2, 0)),
        SamplingParams(max_tokens=10, exit=settings(5, "llama", kv)),  # thresholds that fall from step to step
        SamplingParams(max_tokens=1),
    ]
    for order in (kinds, kinds[::-1]):
        loop, plain = engines("llama", kv, max_num_seqs=6, num_pages=300)
        found, wanted = (engine.generate(prompts(len(order)), order) for engine in (loop, plain))
        assert compared(found) == compared(wanted)
        assert 0 < loop.stats.loop_iterations < loop.stats.iterations
        assert [output.logprobs is None for output in found] == [output.logprobs is None for output in wanted]


@pytest.mark.parametrize("delay", [0, 2, 5])
def test_few_slots_have_rows_for_all_deferred_tokens(delay):
    """A token runs with all of its 64 deferred tokens in one call, also where there are two slots."""
    params = [
        SamplingParams(
            max_tokens=75, ignore_eos=True, exit=ExitSettings(make_policy("fixed", 0.0), max_pending=pending)
        )
        for pending in (64, 4)
    ]
    found = []
    for engine in engines("llama", "deferred", max_num_seqs=2, num_pages=200, max_model_len=128, num_device_steps=1):
        outputs = [engine.requests[engine.add(prompts(1)[0], params[0])].output]
        for _ in range(delay):
            engine.step()
        outputs.append(engine.requests[engine.add(prompts(1)[0], params[1])].output)
        while engine.has_work:
            engine.step()
        found.append(compared(outputs))
    assert found[0] == found[1]
    assert 2 in found[0][0][1][60:], "deferred tokens ran together"


@pytest.mark.parametrize("kv", ["latest", "deferred"])
def test_cancelled_requests_write_nothing(kv, monkeypatch):
    """A token that waits for the coda when its request is cancelled does not run it: its pages have a new owner."""
    monkeypatch.setattr("recursify.engine.device_loop.slot_manager.HEADROOM", 0.2)
    loop, plain = engines("llama", kv, max_num_seqs=16, num_pages=80, num_device_steps=1, enable_prefix_caching=False)
    device, exit_of = loop.slot_manager.loop, DeviceLoop.exit

    def checked(self, shape):
        assert not (self.state.is_exiting & ~self.slots.active).any()
        exit_of(self, shape)

    monkeypatch.setattr(DeviceLoop, "exit", checked)
    ids = set()
    for prompt_ids in prompts(16):
        ids.add(
            loop.add(
                prompt_ids,
                SamplingParams(max_tokens=12, forced_depths=(0, 0, 1 if kv == "latest" else 2), ignore_eos=True),
            )
        )
    params = SamplingParams(max_tokens=8, max_depth=1, ignore_eos=True)
    later = []
    while loop.has_work:
        loop.step()
        for slot, request in enumerate(loop.slot_manager.requests):
            if (
                request is not None
                and request.id in ids
                and bool(device.state.is_exiting[slot])
                and loop.cancel(request.id)
            ):
                later.append(loop.requests[loop.add(prompts(16)[len(later)], params)].output)
    assert len(later) > 2
    assert compared(later) == compared(plain.generate(prompts(len(later)), params))
    assert loop.kv_cache.num_used == 0


def test_all_end_while_some_wait(monkeypatch):
    """Slots whose requests are cancelled do not block others, however many deferred tokens they had."""
    monkeypatch.setattr("recursify.engine.device_loop.slot_manager.HEADROOM", 0.2)
    loop, _ = engines("llama", "deferred", max_num_seqs=32, num_pages=1000, num_device_steps=1, max_model_len=128)
    exits = ExitSettings(make_policy("fixed", 0.0), max_pending=20)
    for ids in prompts(32):
        loop.add(ids, SamplingParams(max_tokens=40, exit=exits, ignore_eos=True))
    for _ in range(300):
        loop.step()
        if bool(loop.slot_manager.loop.state.is_exiting[8:].any()):
            break
    else:
        pytest.fail("no token waits for the coda")
    for request in list(loop.requests):
        loop.cancel(request)
    outputs = [loop.requests[loop.add(ids, SamplingParams(max_tokens=4, max_depth=1))].output for ids in prompts(5)]
    for _ in range(40):
        loop.step()
    assert all(output.finished for output in outputs)


def test_an_error_in_between_loses_nothing(monkeypatch):
    """Unread tokens are generated again: all requests are preempted."""
    loop, plain = engines("llama", "deferred", max_num_seqs=6, num_pages=200, num_device_steps=4)
    params = SamplingParams(max_tokens=16, exit=settings(3, "llama", "deferred"), ignore_eos=True)
    ids = [loop.add(prompt, params) for prompt in prompts(6)]
    outputs = [loop.requests[each].output for each in ids]
    calls, read = [], loop.slot_manager.read_tokens

    def failing():
        calls.append(1)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return read()

    monkeypatch.setattr(loop.slot_manager, "read_tokens", failing)
    while loop.has_work:
        try:
            loop.step()
        except KeyboardInterrupt:
            continue
    assert len(calls) > 5
    assert compared(outputs) == compared(plain.generate(prompts(6), params))


@pytest.mark.parametrize("kv", KV)
def test_policy_switches_while_tokens_wait(kv, monkeypatch):
    """A policy that reads all logits is set while tokens wait for the coda, and removed again."""
    monkeypatch.setattr("recursify.engine.device_loop.slot_manager.HEADROOM", 0.2)
    loop, plain = engines("llama", kv, max_num_seqs=16, num_pages=400, num_device_steps=1)
    forced = SamplingParams(max_tokens=16, forced_depths=(0, 2, 1), ignore_eos=True)
    reading = SamplingParams(max_tokens=5, exit=settings(1, "llama", kv), ignore_eos=True)
    asked = [(ids, reading if number % 4 == 3 else forced) for number, ids in enumerate(prompts(16))]
    found = []
    for engine in (loop, plain):
        outputs = []
        for ids, params in asked:
            outputs.append(engine.requests[engine.add(ids, params)].output)
            engine.step()
            engine.step()
        while engine.has_work:
            engine.step()
        found.append(compared(outputs))
    assert found[0] == found[1]
    assert loop.stats.loop_waits > 0


@pytest.mark.parametrize("how", [1, 3])
@pytest.mark.parametrize("kv", KV)
def test_requests_have_their_own_random_numbers(kv, how):
    """Samples depend on the request alone, not on the batch, on where it runs, or on preemptions."""
    kinds = [{"temperature": 0.8}, {"temperature": 1.3, "top_k": 5}, {"temperature": 2.0, "top_p": 0.7}, {}]
    params = [
        SamplingParams(
            max_tokens=14,
            seed=number,
            ignore_eos=True,
            exit=settings(how, "llama", kv) if number % 3 == 1 else None,
            **kinds[number % 4],
        )
        for number in range(9)
    ]
    loop, plain = engines("llama", kv, max_num_seqs=5, num_pages=40, num_device_steps=3, enable_prefix_caching=False)
    wanted = compared(plain.generate(prompts(9), params))
    ids = [loop.add(prompt, each) for prompt, each in zip(prompts(9), params, strict=True)]
    outputs = [loop.requests[each].output for each in ids]
    number = 0
    while loop.has_work:
        loop.step()
        number += 1
        if number % 7 == 0 and loop.scheduler.running:
            loop.scheduler.preempt(loop.scheduler.running[-1])
    assert compared(outputs) == wanted
    assert loop.stats.preemptions > 1
    assert loop.stats.loop_iterations > 20
    assert len({tuple(tokens) for tokens, *_ in wanted}) == 9


@pytest.mark.parametrize("num_device_steps", [1, 3, 8])
def test_sequences_end_alike(num_device_steps):
    """Tokens after the end are dropped: by EOS, stop tokens, stop strings or length, whichever comes first."""
    model = copy.deepcopy(model_of("llama", "deferred"))
    asked = prompts(6)
    tokens = Engine(model, device_loop=False, max_model_len=64).generate(asked, SamplingParams(max_tokens=12))
    ending = tokens[0].token_ids[4]
    model.generation_config.eos_token_id = [ending, tokens[1].token_ids[6]]
    letter = byte_tokenizer().decode(tokens[2].token_ids[3:5])
    params = [
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=12, ignore_eos=True),
        SamplingParams(max_tokens=12, stop=(letter,) if letter else ("x",)),
        SamplingParams(max_tokens=12, stop_token_ids=(tokens[3].token_ids[5],)),
        SamplingParams(max_tokens=2),
        SamplingParams(max_tokens=50),
    ]
    found = []
    for loop in (True, False):
        engine = Engine(
            model,
            byte_tokenizer(),
            device_loop=loop,
            num_device_steps=num_device_steps,
            max_model_len=64,
            max_num_seqs=6,
        )
        outputs = engine.generate(asked, params)
        found.append([(output.text, *each) for output, each in zip(outputs, compared(outputs), strict=True)])
        assert engine.kv_cache.num_used == 0
    assert found[0] == found[1]
    assert {reason for *_, reason in found[0]} == {"stop", "length"}


def test_slots_are_reused():
    """Nothing is left of cancelled, ended or preempted requests, and the last slots are moved to the first."""
    loop, plain = engines(
        "llama", "deferred", max_num_seqs=16, num_pages=64, num_device_steps=4, enable_prefix_caching=False
    )
    exits = settings(1, "llama", "deferred")
    lengths = [40 if number % 8 == 7 else 5 + number % 3 for number in range(40)]
    params = [SamplingParams(max_tokens=length, exit=exits, ignore_eos=True) for length in lengths]
    wanted = compared(plain.generate(prompts(40), params))
    ids = [loop.add(prompt, each) for prompt, each in zip(prompts(40), params, strict=True)]
    outputs = [loop.requests[each].output for each in ids]
    slots = set()
    number = 0
    while loop.has_work:
        loop.step()
        number += 1
        if number == 12:
            loop.cancel(ids[7])
        if number % 9 == 0 and loop.scheduler.running:
            loop.scheduler.preempt(loop.scheduler.running[-1])
        if loop.slot_manager.num_requests:
            slots.add(loop.slot_manager._rounded(loop.slot_manager._num_slots_used()))
    assert [found for found, each in zip(compared(outputs), ids, strict=True) if each != ids[7]] == [
        found for number, found in enumerate(wanted) if number != 7
    ]
    assert outputs[7].finish_reason == "cancelled"
    assert loop.stats.preemptions > 3
    assert {1, 2, 16} <= slots, "few requests run in few slots"
    assert loop.kv_cache.num_used == 0
    assert not loop.scheduler.device_requests


def test_the_host_syncs_once_for_many_iterations():
    """The stats count the iterations of both loops."""
    loop, plain = engines("llama", "latest", max_num_seqs=4, num_pages=100, num_device_steps=8)
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    for engine in (loop, plain):
        for prompt_ids in prompts(4, shortest=4):
            engine.add(prompt_ids, params)
        under_way = set()
        while engine.has_work:
            engine.step()
            under_way.add(tuple(engine.depths))
        # Without early exits all slots run together, and the host reads when they are at depth 0.
        assert ((0, 0, 0, 0) in under_way) == (engine is loop)
        assert set().union(*under_way) <= {0, 1, 2}
    assert loop.stats.fetches < loop.stats.iterations / 4
    assert plain.stats.fetches > plain.stats.iterations / 4
    assert loop.stats.loop_iterations >= 31 * 3
    assert loop.stats.loop_iterations % 3 == 0, "rounds of all depths"
    # Both loops run the same rows; slots that continue after the last token add none.
    assert loop.stats.block_rows == plain.stats.block_rows
    assert (loop.stats.new_tokens, loop.stats.mean_recursions) == (4 * 32, 3.0)
    assert 0 < loop.stats.loop_seconds <= loop.stats.seconds
    assert loop.stats.implementation == plain.stats.implementation == "reference"
    assert plain.stats.loop_iterations == loop.stats.graph_replays == 0


def test_a_dense_model_is_one_recursion():
    """A dense model has one recursion: tokens enter and exit in every iteration."""
    dense = tiny_dense("qwen3")
    outputs = [
        Engine(dense, device_loop=loop, max_num_seqs=3, max_model_len=64).generate(
            prompts(5), SamplingParams(max_tokens=10, ignore_eos=True)
        )
        for loop in (True, False)
    ]
    assert compared(outputs[0]) == compared(outputs[1])


# --- What a GPU needs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_iteration_does_not_wait_and_has_one_shape(family, kv):
    """Code that reads the contents of a tensor, or has a data-dependent shape, fails on the meta device. Code that runs
    there can be captured in a graph."""
    pytest.importorskip("triton", reason="has wheels for Linux")
    from recursify.kernels.ahead_of_time import recorded

    decoder = adapt_decoder(copy.deepcopy(model_of(family, kv)).to("meta"))
    for how in (0, 1, 2, 3, 6):
        with torch.inference_mode(), decoder.in_use(), recorded() as launches:
            pages = KVCache(decoder, kv, 16, 64, 256)
            loop = DeviceLoop(ModelRunner(decoder, pages, kernels=True), kv, 8, 4, "triton")
            exits = settings(how, family, kv)
            loop.policy = None if exits is None else exits.policy
            drawn = LoopShape(8, 5, loop.max_rows, loop.max_rows, exits_early=True, samples=True)
            for shape in (LoopShape(8, 8, 8, 8, exits_early=False), drawn):
                for part in (loop.enter, loop.block, loop.exit):
                    part(shape)
        names = {launch.name for launch in launches}
        assert {"store_rows", "attend_parts", "read_parts", "advance_all"} <= names
        assert loop.policy_reads_logits == (how == 1)
        assert ("add_norm_rows" in names) == (family != "gpt_neox"), "which has another norm"


CASES = ("llama deferred", "gemma2 latest", "qwen3 copied", "gemma2 shared")


def test_kernels_in_the_engine():
    """Both loops generate the same tokens with Triton's kernels, in its interpreter, as without."""
    pytest.importorskip("triton", reason="has wheels for Linux")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path()}
    command = [sys.executable, "-m", "helpers.interpreted_engine", *CASES]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == "13 runs", process.stdout


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_loop_generates_what_generate_does(device, family, kv):
    """Tokens and depths are those of transformers on the CPU; on a GPU with CUDA graphs and Triton's kernels."""
    model = copy.deepcopy(model_of(family, kv)).to(device)
    for how in (0, 1, 3):
        sizes = {"max_num_seqs": 4, "page_size": 16, "num_pages": 64, "max_model_len": 64}
        engine = Engine(model, kv=kv, force_kv=True, device_loop=True, **sizes)
        outputs = engine.generate(
            [prompt(number) for number in range(6)], SamplingParams(max_tokens=7, exit=settings(how, family, kv))
        )
        for number, output in enumerate(outputs):
            assert (output.token_ids, output.depths) == expected(family, kv, number, how)
        assert engine.stats.loop_iterations > 0
        assert engine.stats.implementation == ("triton" if device == "cuda" else "reference")
        assert (engine.stats.graph_replays > 0) == (device == "cuda")
        assert engine.slot_manager.graphs.problem is None


class Graph:
    """Fake CUDA graph that counts replays."""

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


@pytest.fixture
def graphs(monkeypatch):
    """Fakes in place of torch.cuda's graphs."""
    captured: list[Graph] = []

    class Capture:
        def __init__(self, graph, **_):
            pass

        def __enter__(self):
            pass

        def __exit__(self, kind, error, traceback):
            if error is not None:  # as in torch, ending a failed capture raises an error of its own
                raise RuntimeError("operation failed due to a previous error during capture")

    def make() -> Graph:
        captured.append(Graph())
        return captured[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for name in ("graph_pool_handle", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return captured


def test_calls_are_captured_after_the_first_time(graphs):
    """One graph per key: the first run is eager, which warms up, and capturing executes nothing."""
    calls = CudaGraphs(torch.device("cuda"))
    called = []
    for key in ("a", "b"):
        calls.run(key, lambda key=key: called.append(key), 3)
        assert called == [key] * 4, "three, and one that was captured"
        calls.run(key, lambda key=key: called.append(key), 5)
        assert called == [key] * 4
        assert graphs[-1].replayed == 5
        called.clear()
    assert (calls.num_graphs, calls.num_replays, calls.problem) == (2, 10, None)


def test_what_cannot_be_captured_runs_without(graphs, caplog):
    """A failed capture gives one warning, and iterations run without graphs."""
    calls = CudaGraphs(torch.device("cuda"))
    called = []

    def function() -> None:
        called.append(1)
        if len(called) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            calls.run("a", function, 2)
    assert len(called) == 7, "the third call was the failed capture"
    assert (calls.num_graphs, calls.num_replays) == (0, 0)
    assert [record.message for record in caplog.records] == [
        "CUDA graph capture failed; iterations run without graphs: operation not permitted when stream is capturing"
    ]


def test_a_gpu_without_triton_gets_one_warning(monkeypatch, caplog):
    """The engine then uses the references of the kernels."""

    class Parts:
        device = torch.device("cuda")
        has_plain_heads = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    checks.why_not_triton.cache_clear()
    checks._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert checks.choose_implementation("auto", Parts()) == "reference"
    checks.why_not_triton.cache_clear()
    assert len(caplog.records) == 1
    assert "its compute capability is 7.5, and kernels need 8.0" in caplog.text


def test_bad_settings():
    """Errors name the setting and the obstacle."""
    model = model_of("llama", "deferred")
    with pytest.raises(EngineError, match="implementation 'triton' cannot run on 'cpu': Triton compiles for GPUs"):
        Engine(model, implementation="triton")
    with pytest.raises(EngineError, match=r"Unknown implementation 'cuda'\. Use one of: auto, reference, triton"):
        Engine(model, implementation="cuda")
    with pytest.raises(EngineError, match=r"does not support a lockstep engine\. Leave device_loop out"):
        Engine(model, device_loop=True, lockstep=True)
    with pytest.raises(EngineError, match="does not support models with routers"):
        Engine(model_of("llama", "shared"), device_loop=True)
    with pytest.raises(EngineError, match="num_device_steps must be a whole number of at least 1, got 0"):
        Engine(model, num_device_steps=0)
