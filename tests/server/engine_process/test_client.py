"""Client of an engine in a thread: its output is the engine's, and every listener learns of the engine's end.

Tests that need a process of its own are in ``test_process.py``.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from helpers.small_engine import prompts, recursive, small_engine
from helpers.tiny_models import byte_tokenizer
from recursify.engine import Engine, RequestOutput, SamplingParams
from recursify.errors import CheckpointError, EngineError
from recursify.server.engine_process import Accepted, EngineClient, EngineFailure, EngineSnapshot
from recursify.server.engine_process.protocol import Connection, ConnectionClosed, pack, unpack
from recursify.server.engine_process.scoring import score_prompt


def make() -> Engine:
    return small_engine(recursive(), byte_tokenizer())


class Listener:
    """Listener that keeps all items of one request."""

    def __init__(self, client: EngineClient, prompt: list[int], params: SamplingParams) -> None:
        self.items: list[Any] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.number = client.submit(prompt, params, self.listen)

    def listen(self, item: Any) -> None:
        self.items.append(item)
        ends = isinstance(item, Exception) or (not isinstance(item, Accepted) and item.finish_reason is not None)
        if ends:
            self.ended.set_result(item)


def with_client(use: Callable[[EngineClient, Engine], Any], **arguments: Any) -> Any:
    """Result of ``use``, given a client of an engine in a thread, and that engine."""

    async def run() -> Any:
        made: list[Engine] = []
        client = await EngineClient.open(lambda: made.append(make()) or made[0], own_process=False, **arguments)
        try:
            return await asyncio.wait_for(use(client, made[0]), 60)
        finally:
            await client.close()

    return asyncio.run(run())


def alone(asked: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    return make().generate(asked, params)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=12, logprobs=3),
        SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=3),
        SamplingParams(max_tokens=12, max_depth=0),
    ],
    ids=["logprobs", "sampled", "shallow"],
)
def test_answers_are_the_engines(params):
    """Several requests at once: the chunks add up to the output, which is the engine's own."""
    asked = prompts(4, 11, 7, 5, 9)

    async def use(client, engine):
        listeners = [Listener(client, prompt, params) for prompt in asked]
        last = [(await listener.ended).output for listener in listeners]
        assert all(listener.items[0] == Accepted() for listener in listeners)
        for listener, output in zip(listeners, last, strict=True):
            chunks = listener.items[1:]
            assert [token for chunk in chunks for token in chunk.token_ids] == output.token_ids
            assert "".join(chunk.text for chunk in chunks) == output.text
            assert len(chunks) == len(output.token_ids)
        return last

    for found, expected in zip(with_client(use), alone(asked, params), strict=True):
        expected.request_id = found.request_id
        assert found == expected


def test_a_text_that_is_written_otherwise_at_its_end():
    """Decoding a text at once may differ from decoding it piece by piece: the output has the former."""

    class Tidy:
        """Writes long texts in capitals, so that no beginning of one is kept as it was."""

        def decode(self, tokens, **_):
            text = "".join("abcd"[token % 4] for token in tokens)
            return text.upper() if len(tokens) >= 6 else text

    async def use(client, engine):
        engine.tokenizer = Tidy()
        return (await Listener(client, [5], SamplingParams(max_tokens=8)).ended).output

    engine = make()
    engine.tokenizer = Tidy()
    (expected,) = engine.generate([[5]], SamplingParams(max_tokens=8))
    assert expected.text.isupper()
    assert with_client(use).text == expected.text


def test_a_refusal_is_the_requests_own():
    """It has the engine's message, and other requests go on; a bug is an EngineFailure."""

    async def use(client, engine):
        refused = await Listener(client, [], SamplingParams()).ended
        assert isinstance(refused, EngineError)
        assert "no tokens" in str(refused)
        add, engine.add = engine.add, lambda prompt, params: 1 / 0
        broken = await Listener(client, [5], SamplingParams()).ended
        engine.add = add
        assert isinstance(broken, EngineFailure)
        assert broken.kind == "ZeroDivisionError"
        assert "In the engine:\nTraceback" in broken.__notes__[0]
        assert client.is_running
        assert (await Listener(client, [5], SamplingParams(max_tokens=3)).ended).finish_reason == "length"

    with_client(use)


def test_requests_that_come_together_begin_together(monkeypatch):
    """An idle engine waits a moment for more requests: all of them run in the same iterations."""
    monkeypatch.setattr("recursify.server.engine_process.process.GAP_SECONDS", 1.0)
    monkeypatch.setattr("recursify.server.engine_process.process.GATHER_SECONDS", 60.0)
    asked, params = prompts(4, 5, 6), SamplingParams(max_tokens=5)

    async def use(client, engine):
        listeners = []
        for prompt in asked:
            listeners.append(Listener(client, prompt, params))
            while not listeners[-1].items:
                await asyncio.sleep(0)
        for listener in listeners:
            await listener.ended
        return engine.stats.iterations

    engine = make()
    engine.generate(asked, params)
    assert with_client(use) == engine.stats.iterations


def test_cancelled_requests_get_no_more_items():
    """The request and its pages are freed, and its listener is not called again."""

    async def use(client, engine):
        listener = Listener(client, prompts(6)[0], SamplingParams(max_tokens=200))
        while len(listener.items) < 3:
            await asyncio.sleep(0)
        client.cancel(listener.number)
        client.cancel(listener.number)
        count = len(listener.items)
        assert (await client.snapshot()).running == 0
        assert engine.kv_cache.num_used == 0
        assert len(listener.items) == count

    with_client(use)


def test_calls_run_between_iterations():
    """Counts and scores, while a request runs."""
    ids = prompts(30)[0]

    async def use(client, engine):
        listener = Listener(client, ids[:5], SamplingParams(max_tokens=40))
        scores, snapshot = await asyncio.gather(client.score(ids, 2), client.snapshot())
        assert snapshot.running + snapshot.waiting == 1
        assert len((await listener.ended).output.token_ids) == 40
        await client.reset_stats()
        assert (await client.snapshot()).totals["generated_tokens"] == 0
        with pytest.raises(EngineFailure, match="IndexError"):
            await client.score([10**6], 1)
        return scores

    assert with_client(use) == score_prompt(make(), ids, 2)


def test_a_cancelled_score_is_not_computed():
    """Of ten scores, only the one that is awaited is computed."""
    made = []

    async def use(client, engine):
        forward = engine.model.base_model.forward

        def counted(*arguments, **named):
            made.append(1)
            return forward(*arguments, **named)

        held, engine.reset_stats = threading.Event(), lambda: held.wait(30)
        holding = asyncio.ensure_future(client.reset_stats())
        asking = [asyncio.ensure_future(client.score([5, 6, 7], 1)) for _ in range(10)]
        await asyncio.sleep(0)
        engine.model.base_model.forward = counted
        for each in asking[1:]:
            each.cancel()
        await asyncio.gather(*asking[1:], return_exceptions=True)
        held.set()
        await holding
        await asking[0]
        await client.snapshot()

    with_client(use)
    assert len(made) == 1


def test_a_failure_reaches_every_listener():
    """Requests, calls and later callers get it; last counts and the traceback are kept."""
    reasons: list[Exception] = []

    async def use(client, engine):
        first = Listener(client, [5, 6], SamplingParams(max_tokens=100))
        second = Listener(client, [7], SamplingParams(max_tokens=100))
        while not (len(first.items) > 5 and second.items):
            await asyncio.sleep(0)
        engine.scheduler.schedule = lambda: 1 / 0
        errors = [await first.ended, await second.ended]
        assert errors == [client.error, client.error]
        assert reasons == [client.error]
        assert (client.error.kind, str(client.error)) == ("ZeroDivisionError", "ZeroDivisionError: division by zero")
        assert "schedule" in client.error.__notes__[0]
        assert client.last_snapshot.totals["prompt_tokens"] == 3
        assert not client.is_running
        for ask in (client.snapshot(), client.score([5], 1)):
            with pytest.raises(EngineError, match="The engine has stopped: ZeroDivisionError"):
                await ask
        with pytest.raises(EngineError, match="The engine has stopped: ZeroDivisionError"):
            client.submit([5], SamplingParams(), reasons.append)

    with_client(use, on_stop=reasons.append)


def test_closing_ends_the_engine():
    """Listeners get an error, and the thread ends."""

    async def use(client, engine):
        listener = Listener(client, [5], SamplingParams(max_tokens=200))
        question = asyncio.ensure_future(client.score([5], 1))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(EngineError, match="The engine was closed"):
            raise await listener.ended
        with pytest.raises(EngineError, match="The engine was closed"):
            await question
        with pytest.raises(EngineError, match="it was closed"):
            await client.snapshot()

    before = set(threading.enumerate())
    with_client(use)
    assert not {thread for thread in threading.enumerate() if thread.name == "recursify-engine"} - before


def test_a_listeners_error_is_its_own(caplog):
    """It is logged, and other requests go on."""

    async def use(client, engine):
        client.submit([5], SamplingParams(max_tokens=5), lambda what: 1 / 0)
        return (await Listener(client, [5], SamplingParams(max_tokens=5)).ended).finish_reason

    assert with_client(use) == "length"
    assert "The listener of request 1 failed" in caplog.text


def fail_as_ours() -> Engine:
    raise CheckpointError("There is no model in /models.")


def fail_as_another() -> Engine:
    raise MemoryError("no room")


def leave() -> Engine:
    os._exit(7)


@pytest.mark.parametrize(
    ("build", "own_process", "error", "message"),
    [
        (fail_as_ours, False, CheckpointError, "There is no model in /models"),
        (fail_as_another, False, EngineFailure, "MemoryError: no room"),
        (leave, True, EngineFailure, "The engine's process ended with exit code 7"),
    ],
)
def test_an_engine_that_cannot_be_made(build, own_process, error, message):
    """Its own error, if it is one of ours; else which one it was, or how the process ended."""
    with pytest.raises(error, match=message):
        asyncio.run(EngineClient.open(build, own_process=own_process))


# --- Streams -----------------------------------------------------------------------------------------------------


def test_a_stream_yields_the_output_as_it_is_generated():
    """For text and for token ids; several at once."""
    params = SamplingParams(max_tokens=9)

    async def collect(client, prompt):
        return [chunk async for chunk in client.stream(prompt, params)]

    async def use(client, engine):
        return await asyncio.gather(*(collect(client, prompt) for prompt in ["hello", *prompts(4, 11)]))

    expected = make().generate(["hello", *prompts(4, 11)], params)
    for chunks, output in zip(with_client(use), expected, strict=True):
        assert [token for chunk in chunks for token in chunk.token_ids] == output.token_ids
        assert "".join(chunk.text for chunk in chunks) == output.text
        assert chunks[-1].finish_reason == "length"


def test_closing_a_stream_cancels_its_request():
    """The request and its pages are freed; other streams go on."""

    async def use(client, engine):
        stream = client.stream(prompts(4)[0], SamplingParams(max_tokens=200))
        other = asyncio.ensure_future(anext(client.stream(prompts(6)[0], SamplingParams(max_tokens=1))))
        async for _ in stream:
            break
        await stream.aclose()
        assert (await other).finish_reason == "length"
        assert (await client.snapshot()).running == 0
        assert engine.kv_cache.num_used == 0

    with_client(use)


def test_a_stream_raises_the_engines_errors():
    """A refusal, a failure, and the end of the client."""

    async def use(client, engine):
        with pytest.raises(EngineError, match="no tokens"):
            await anext(client.stream([]))
        with pytest.raises(EngineError, match="needs exit heads"):
            await anext(client.stream([1], SamplingParams(exit="head")))
        stream = client.stream([5])
        await anext(stream)
        engine.scheduler.schedule = lambda: 1 / 0
        with pytest.raises(EngineFailure, match="ZeroDivisionError: division by zero"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="The engine has stopped: ZeroDivisionError"):
            await anext(client.stream([5]))

    with_client(use)


# --- Protocol ------------------------------------------------------------------------------------------------------


def test_messages_arrive_in_any_pieces():
    """A socket may split a message anywhere."""
    messages = [("submit", 1, list(range(500))), "", [(3, EngineSnapshot())]]
    data = b"".join(map(pack, messages))
    for size in (1, 7, 100, len(data)):
        buffer, found = bytearray(), []
        for start in range(0, len(data), size):
            buffer += data[start : start + size]
            found += unpack(buffer)
        assert (found, buffer) == (messages, b"")


def test_a_closed_connection():
    """Both directions raise an error."""
    ours, theirs = socket.socketpair()
    connection = Connection(theirs)
    assert connection.receive(0.0) == []
    ours.sendall(pack("last")[:-1])
    assert connection.receive(None) == []
    ours.close()
    with pytest.raises(ConnectionClosed):
        connection.receive(None)
    with pytest.raises(ConnectionClosed):
        connection.send("x")
    connection.close()
