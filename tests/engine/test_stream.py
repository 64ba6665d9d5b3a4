"""An engine in a thread: answers as they come, to one event loop or several threads, and what happens at its end."""

import asyncio
import threading

import pytest
from test_engine import byte_tokenizer, prompts, recursive, small_engine

from recursify.engine import Engine, EngineThread, SamplingParams
from recursify.errors import EngineError


@pytest.fixture
def running():
    thread = EngineThread(small_engine(recursive(), byte_tokenizer()))
    yield thread
    thread.close(drain=False, timeout=10)


def alone(prompt, params) -> list[int]:
    return Engine(recursive(), byte_tokenizer()).generate([prompt], params)[0].token_ids


async def listen(running, prompt, params, stop_after: int | None = None):
    tokens, text, reason = [], "", None
    async for chunk in running.stream(prompt, params):
        tokens += chunk.token_ids
        text += chunk.text
        reason = chunk.finish_reason
        assert len(chunk.depths) == len(chunk.token_ids)
        if stop_after is not None and len(tokens) >= stop_after:
            break
    return tokens, text, reason


def test_answers_come_in_pieces(running):
    """Several at once; the pieces are the whole."""
    asked, params = prompts(4, 11, 7, 5, 9), SamplingParams(max_tokens=12)

    async def all_of_them():
        return await asyncio.gather(*(listen(running, each, params) for each in asked))

    for prompt, (tokens, text, reason) in zip(asked, asyncio.run(all_of_them()), strict=True):
        assert tokens == alone(prompt, params)
        assert text == byte_tokenizer().decode(tokens, skip_special_tokens=True)
        assert reason == "length"


def test_who_stops_listening_cancels(running):
    """The request ends, its pages come back, and others go on."""
    asked = prompts(4, 11)

    async def both():
        return await asyncio.gather(
            listen(running, asked[0], SamplingParams(max_tokens=40), stop_after=2),
            listen(running, asked[1], SamplingParams(max_tokens=9)),
        )

    (left, _, _), (heard, _, reason) = asyncio.run(both())
    assert len(left) == 2
    assert (len(heard), reason) == (9, "length")
    deadline = threading.Event()
    for _ in range(200):
        if not running.call(lambda engine: engine.has_work).result(10):
            break
        deadline.wait(0.05)
    assert running.call(lambda engine: engine.pages.num_used).result(10) == 0


def test_refusals_reach_the_caller(running):
    with pytest.raises(EngineError, match="no tokens"):
        asyncio.run(listen(running, [], SamplingParams()))
    with pytest.raises(EngineError, match="needs exit heads"):
        asyncio.run(listen(running, [1], SamplingParams(exit="head")))


def test_closing_finishes_what_there_is():
    thread = EngineThread(small_engine(recursive()))
    heard = []
    thread.submit(prompts(5)[0], SamplingParams(max_tokens=20), heard.append).result(10)
    assert thread.close(timeout=30)
    assert heard[-1].finish_reason == "length"
    assert not thread.is_running
    with pytest.raises(EngineError, match="is closing and takes no more requests"):
        thread.submit([1], None, heard.append)


def test_closing_can_cancel():
    thread = EngineThread(small_engine(recursive()))
    heard = []
    for each in prompts(5, 6, 7, 8, 9, 10):
        thread.submit(each, SamplingParams(max_tokens=40), heard.append)
    assert thread.close(drain=False, timeout=30)
    assert len([chunk for chunk in heard if chunk.finish_reason]) == 6
    assert heard[-1].finish_reason == "cancelled"


def test_a_failure_is_told_to_all(running):
    """A bug in the engine ends every answer with an error, at once, and later requests too."""

    async def fail():
        first = asyncio.create_task(listen(running, prompts(4)[0], SamplingParams(max_tokens=40)))
        second = asyncio.create_task(listen(running, prompts(6)[0], SamplingParams(max_tokens=40)))
        await asyncio.sleep(0.01)
        running.call(lambda engine: setattr(engine.scheduler, "schedule", lambda: 1 / 0))
        return await asyncio.gather(first, second, return_exceptions=True)

    for error in asyncio.run(fail()):
        assert isinstance(error, EngineError)
        assert "The engine has stopped: division by zero" in str(error)
    assert not running.is_running
    with pytest.raises(EngineError, match="The engine has stopped: division by zero"):
        asyncio.run(listen(running, [1], SamplingParams()))


def test_many_threads(running):
    """Callers of several threads at once."""
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = asyncio.run(listen(running, prompts(3 + number)[0], SamplingParams(max_tokens=6)))[0]

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert answers == {number: alone(prompts(3 + number)[0], SamplingParams(max_tokens=6)) for number in range(6)}


def test_callers_who_leave_early(running):
    """Before their request was taken, or with an event loop that ends while it runs: it is cancelled, and no more."""

    async def leave():
        task = asyncio.create_task(listen(running, prompts(4)[0], SamplingParams(max_tokens=40)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listen(running, prompts(5)[0], SamplingParams(max_tokens=40), stop_after=1)

    for _ in range(5):
        asyncio.run(leave())
    assert asyncio.run(listen(running, prompts(6)[0], SamplingParams(max_tokens=3)))[2] == "length"
    while running.call(lambda engine: engine.has_work).result(10):
        pass
    assert running.call(lambda engine: engine.pages.num_used).result(10) == 0


def test_a_listener_that_fails_fails_alone(running):
    """Its request is cancelled; the engine and others go on, and an error reaches those that can hear."""
    heard = []

    def fail(chunk):
        heard.append(chunk)
        raise RuntimeError("deaf")

    running.submit(prompts(4)[0], SamplingParams(max_tokens=40), fail).result(10)
    assert asyncio.run(listen(running, prompts(6)[0], SamplingParams(max_tokens=9)))[2] == "length"
    while running.call(lambda engine: engine.has_work).result(10):
        pass
    assert len(heard) == 1
    with pytest.raises(EngineError, match="text or a list of token ids"):
        running.submit(["a"], None, heard.append).result(10)
    others = []
    running.submit(prompts(4)[0], SamplingParams(max_tokens=40), lambda chunk: 1 / 0 if chunk is error else None)
    running.submit(prompts(4)[0], SamplingParams(max_tokens=40), others.append)
    error = ArithmeticError("broken")

    def break_down() -> None:
        raise error

    running.call(lambda engine: setattr(engine.scheduler, "schedule", break_down))
    running._thread.join(10)
    assert others[-1] is error
