"""An engine elsewhere: what is heard of it is what it says, and its end is told to all. Here it is in a thread; what
only a process can do is in ``tests/server/test_engine_process.py``."""

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


class Heard:
    """All that is said of one answer."""

    def __init__(self, link: EngineClient, prompt: list[int], params: SamplingParams) -> None:
        self.said: list[Any] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.number = link.submit(prompt, params, self.listen)

    def listen(self, what: Any) -> None:
        self.said.append(what)
        ends = isinstance(what, Exception) or (not isinstance(what, Accepted) and what.finish_reason is not None)
        if ends:
            self.ended.set_result(what)


def linked(use: Callable[[EngineClient, Engine], Any], **arguments: Any) -> Any:
    """What ``use`` makes of a link to an engine in a thread, and of that engine."""

    async def run() -> Any:
        made: list[Engine] = []
        link = await EngineClient.open(lambda: made.append(make()) or made[0], own_process=False, **arguments)
        try:
            return await asyncio.wait_for(use(link, made[0]), 60)
        finally:
            await link.close()

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
    """Several at once: the pieces are the whole, and the whole is what the engine says alone."""
    asked = prompts(4, 11, 7, 5, 9)

    async def use(link, engine):
        heard = [Heard(link, prompt, params) for prompt in asked]
        last = [(await each.ended).output for each in heard]
        assert all(each.said[0] == Accepted() for each in heard)
        for each, output in zip(heard, last, strict=True):
            chunks = each.said[1:]
            assert [token for chunk in chunks for token in chunk.token_ids] == output.token_ids
            assert "".join(chunk.text for chunk in chunks) == output.text
            assert len(chunks) == len(output.token_ids)
        return last

    for found, expected in zip(linked(use), alone(asked, params), strict=True):
        expected.request_id = found.request_id
        assert found == expected


def test_a_text_that_is_written_otherwise_at_its_end():
    """A tokenizer may write a whole text otherwise than its pieces: the answer has the whole."""

    class Tidy:
        """Writes long texts in capitals, so that no beginning of one is kept as it was."""

        def decode(self, tokens, **_):
            text = "".join("abcd"[token % 4] for token in tokens)
            return text.upper() if len(tokens) >= 6 else text

    async def use(link, engine):
        engine.tokenizer = Tidy()
        return (await Heard(link, [5], SamplingParams(max_tokens=8)).ended).output

    engine = make()
    engine.tokenizer = Tidy()
    (expected,) = engine.generate([[5]], SamplingParams(max_tokens=8))
    assert expected.text.isupper()
    assert linked(use).text == expected.text


def test_a_refusal_is_the_requests_own():
    """It comes with the engine's words, and others go on; a bug in taking it is told apart."""

    async def use(link, engine):
        refused = await Heard(link, [], SamplingParams()).ended
        assert isinstance(refused, EngineError)
        assert "no tokens" in str(refused)
        add, engine.add = engine.add, lambda prompt, params: 1 / 0
        broken = await Heard(link, [5], SamplingParams()).ended
        engine.add = add
        assert isinstance(broken, EngineFailure)
        assert broken.kind == "ZeroDivisionError"
        assert "In the engine:\nTraceback" in broken.__notes__[0]
        assert link.is_running
        assert (await Heard(link, [5], SamplingParams(max_tokens=3)).ended).finish_reason == "length"

    linked(use)


def test_requests_that_come_together_begin_together(monkeypatch):
    """An engine that had nothing to do waits a moment for others: all of them go through the same iterations."""
    monkeypatch.setattr("recursify.server.engine_process.process.GAP_SECONDS", 1.0)
    monkeypatch.setattr("recursify.server.engine_process.process.GATHER_SECONDS", 60.0)
    asked, params = prompts(4, 5, 6), SamplingParams(max_tokens=5)

    async def use(link, engine):
        heard = []
        for prompt in asked:
            heard.append(Heard(link, prompt, params))
            while not heard[-1].said:
                await asyncio.sleep(0)
        for each in heard:
            await each.ended
        return engine.stats.iterations

    engine = make()
    engine.generate(asked, params)
    assert linked(use) == engine.stats.iterations


def test_who_cancels_hears_no_more():
    """The request has gone from the engine, pages too, and nothing is said of it."""

    async def use(link, engine):
        heard = Heard(link, prompts(6)[0], SamplingParams(max_tokens=200))
        while len(heard.said) < 3:
            await asyncio.sleep(0)
        link.cancel(heard.number)
        link.cancel(heard.number)
        said = len(heard.said)
        assert (await link.snapshot()).running == 0
        assert engine.kv_cache.num_used == 0
        assert len(heard.said) == said

    linked(use)


def test_questions_are_answered_between_iterations():
    """Counts and scores while an answer is under way; who does not wait for a score has none made."""
    ids = prompts(30)[0]

    async def use(link, engine):
        heard = Heard(link, ids[:5], SamplingParams(max_tokens=40))
        scores, snapshot = await asyncio.gather(link.score(ids, 2), link.snapshot())
        assert snapshot.running + snapshot.waiting == 1
        assert len((await heard.ended).output.token_ids) == 40
        await link.reset_stats()
        assert (await link.snapshot()).totals["generated_tokens"] == 0
        with pytest.raises(EngineFailure, match="IndexError"):
            await link.score([10**6], 1)
        return scores

    assert linked(use) == score_prompt(make(), ids, 2)


def test_a_score_that_nobody_waits_for_is_not_made():
    """Of ten that were asked for, those are not made whose callers have gone before their turn."""
    made = []

    async def use(link, engine):
        forward = engine.model.base_model.forward

        def counted(*arguments, **named):
            made.append(1)
            return forward(*arguments, **named)

        held, engine.reset_stats = threading.Event(), lambda: held.wait(30)
        holding = asyncio.ensure_future(link.reset_stats())
        asking = [asyncio.ensure_future(link.score([5, 6, 7], 1)) for _ in range(10)]
        await asyncio.sleep(0)
        engine.model.base_model.forward = counted
        for each in asking[1:]:
            each.cancel()
        await asyncio.gather(*asking[1:], return_exceptions=True)
        held.set()
        await holding
        await asking[0]
        await link.snapshot()

    linked(use)
    assert len(made) == 1


def test_a_failure_is_told_to_all():
    """To answers, questions and later callers, with the last counts, and the traceback for the log."""
    told: list[Exception] = []

    async def use(link, engine):
        first = Heard(link, [5, 6], SamplingParams(max_tokens=100))
        second = Heard(link, [7], SamplingParams(max_tokens=100))
        while not (len(first.said) > 5 and second.said):
            await asyncio.sleep(0)
        engine.scheduler.schedule = lambda: 1 / 0
        errors = [await first.ended, await second.ended]
        assert errors == [link.error, link.error]
        assert told == [link.error]
        assert (link.error.kind, str(link.error)) == ("ZeroDivisionError", "ZeroDivisionError: division by zero")
        assert "schedule" in link.error.__notes__[0]
        assert link.last_snapshot.totals["prompt_tokens"] == 3
        assert not link.is_running
        for ask in (link.snapshot(), link.score([5], 1)):
            with pytest.raises(EngineError, match="The engine has stopped: ZeroDivisionError"):
                await ask
        with pytest.raises(EngineError, match="The engine has stopped: ZeroDivisionError"):
            link.submit([5], SamplingParams(), told.append)

    linked(use, on_stop=told.append)


def test_closing_ends_the_engine():
    """Whatever it was at: who listens is told, and its thread is gone."""

    async def use(link, engine):
        heard = Heard(link, [5], SamplingParams(max_tokens=200))
        question = asyncio.ensure_future(link.score([5], 1))
        await asyncio.sleep(0)
        await link.close()
        with pytest.raises(EngineError, match="The engine was closed"):
            raise await heard.ended
        with pytest.raises(EngineError, match="The engine was closed"):
            await question
        with pytest.raises(EngineError, match="it was closed"):
            await link.snapshot()

    before = set(threading.enumerate())
    linked(use)
    assert not {thread for thread in threading.enumerate() if thread.name == "recursify-engine"} - before


def test_a_listeners_error_is_its_own(caplog):
    """It is logged, and the others hear on."""

    async def use(link, engine):
        link.submit([5], SamplingParams(max_tokens=5), lambda what: 1 / 0)
        return (await Heard(link, [5], SamplingParams(max_tokens=5)).ended).finish_reason

    assert linked(use) == "length"
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


# --- Frames ------------------------------------------------------------------------------------------------------


def test_frames_come_in_any_pieces():
    """Whatever a socket cuts a message into."""
    messages = [("submit", 1, list(range(500))), "", [(3, EngineSnapshot())]]
    data = b"".join(map(pack, messages))
    for size in (1, 7, 100, len(data)):
        buffer, found = bytearray(), []
        for start in range(0, len(data), size):
            buffer += data[start : start + size]
            found += unpack(buffer)
        assert (found, buffer) == (messages, b"")


def test_a_channel_without_a_partner():
    """Both directions say so."""
    ours, theirs = socket.socketpair()
    channel = Connection(theirs)
    assert channel.receive(0.0) == []
    ours.sendall(pack("last")[:-1])
    assert channel.receive(None) == []
    ours.close()
    with pytest.raises(ConnectionClosed):
        channel.receive(None)
    with pytest.raises(ConnectionClosed):
        channel.send("x")
    channel.close()
