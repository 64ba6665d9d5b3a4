"""The engine's thread outlives callers who leave at a bad moment."""

from __future__ import annotations

import asyncio
import threading

import pytest
from running import build, eventually

from recursify.engine import EngineThread, SamplingParams


@pytest.fixture
def thread():
    """A thread that can be held up: nothing is accepted until ``go`` is set."""
    made = EngineThread(build()())
    made.go = threading.Event()
    held = made.call(lambda engine: made.go.wait(30))
    assert eventually(held.running)
    yield made
    made.go.set()
    assert made.close(drain=False, timeout=30)


def test_a_cancelled_wait_is_no_failure(thread):
    """Futures that nobody waits for any more: the request is not taken, the function not called."""
    called: list[int] = []
    accepted = thread.submit([5], SamplingParams(max_tokens=2), called.append)
    read = thread.call(lambda engine: called.append(1))
    assert accepted.cancel()
    assert read.cancel()
    thread.go.set()
    assert thread.call(lambda engine: len(engine.requests)).result(30) == 0
    assert called == []
    assert thread.is_running


def test_who_leaves_before_being_accepted_is_cancelled(thread):
    """Also where the engine had taken the request by then."""

    async def leave() -> None:
        asking = asyncio.ensure_future(anext(thread.stream([5], SamplingParams(max_tokens=200))))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    thread.go.set()
    assert eventually(lambda: not thread.call(lambda engine: engine.has_work).result(30))
    assert thread.is_running
