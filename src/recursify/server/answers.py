"""Answers on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from recursify.engine import EngineThread, RequestOutput, SamplingParams, StreamChunk
from recursify.errors import EngineError

from .errors import ApiError

if TYPE_CHECKING:
    from .host import EngineHost


INTERVAL_SECONDS = 0.01
"""Between two deliveries: what comes meanwhile is sent together. The event loop and the engine's thread take turns at
Python, so every token that is sent by itself costs the engine time."""


class Inbox:
    """Takes what the engine's thread says into the event loop, all that it said meanwhile in one wake-up.

    Args:
        loop: Where it goes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._delivered = -INTERVAL_SECONDS
        self._items: deque[tuple[Answers, int, Any]] = deque()
        self._is_coming = False

    def put(self, answers: Answers, index: int, item: Any) -> None:
        """Called in any thread: ``item`` is for the answer ``index`` of ``answers``."""
        self._items.append((answers, index, item))
        if not self._is_coming and not self._loop.is_closed():
            self._is_coming = True
            try:
                self._loop.call_soon_threadsafe(self._come)
            except RuntimeError:  # the loop has closed since: nobody listens
                self._items.clear()

    def _come(self) -> None:
        self._loop.call_at(self._delivered + INTERVAL_SECONDS, self._deliver)

    def _deliver(self) -> None:
        self._delivered = self._loop.time()
        # Before reading: what is put from now on is read below, or brings another wake-up.
        self._is_coming = False
        while self._items:
            answers, index, item = self._items.popleft()
            answers.receive(index, item)


class Answers:
    """The answers to one call of the server, which may ask the engine several things.

    Args:
        host: Of the engine; knows why it has stopped.
        thread: The engine's.
        inbox: Through which it speaks.
        asked: Prompts and parameters.

    Attributes:
        outputs: By index, all that has come of an answer.
    """

    def __init__(
        self,
        host: EngineHost,
        thread: EngineThread,
        inbox: Inbox,
        asked: Sequence[tuple[list[int], SamplingParams]],
    ) -> None:
        self._host, self._thread, self._inbox, self._asked = host, thread, inbox, asked
        self._ids: dict[int, int] = {}
        self._open = set(range(len(asked)))
        self._chunks: list[tuple[int, StreamChunk]] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()
        seconds = host.settings.request_seconds
        late = ApiError(504, f"The answer was not ready within {seconds:g} seconds.", code="timeout")
        # One timer per request: a limit to every wait would be a task per token.
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, late)
        self._closed = False
        self.outputs: dict[int, RequestOutput] = {}

    # --- For the request -----------------------------------------------------------------------------------------

    async def accept(self) -> None:
        """Ask, and wait until the engine has taken all.

        Raises:
            EngineError: It refused one.
            ApiError: It has stopped.
        """
        for index, (prompt, params) in enumerate(self._asked):
            try:
                accepted = self._thread.submit(prompt, params, partial(self._inbox.put, self, index))
            except EngineError as error:
                raise self._stopped() from error
            accepted.add_done_callback(partial(self._inbox.put, self, index))
        while len(self._ids) < len(self._asked):
            await self._wait()

    async def chunks(self) -> AsyncIterator[list[tuple[int, StreamChunk]]]:
        """What has come since the last time, with the answers' indices, until all have ended.

        Raises:
            ApiError: The engine has stopped, the server ends, or it took too long.
        """
        while self._open or self._chunks:
            if self._chunks:
                chunks, self._chunks = self._chunks, []
                yield chunks
            else:
                await self._wait()

    async def whole(self) -> list[RequestOutput]:
        """All answers, when all have ended."""
        async for _ in self.chunks():
            pass
        return [self.outputs[index] for index in range(len(self._asked))]

    def fail(self, error: Exception) -> None:
        """End with ``error``."""
        self._error = self._error or error
        self._news.set()

    def close(self) -> None:
        """Nobody listens any more: cancel what has not ended."""
        self._closed = True
        self._timer.cancel()
        for index in self._open & set(self._ids):
            self._thread.cancel(self._ids[index])
        self._open.clear()

    # --- From the engine -----------------------------------------------------------------------------------------

    def receive(self, index: int, item: StreamChunk | BaseException | Future[int]) -> None:
        """What the engine says of the answer ``index``: that it is accepted or refused, a chunk, or its own end."""
        if isinstance(item, Future):
            self._receive_acceptance(index, item)
        elif isinstance(item, BaseException):
            self._host.log_failure()
            self._open.discard(index)
            self._error = self._error or self._stopped()
        else:
            self.outputs[index] = item.output
            if item.finish_reason is not None:
                self._open.discard(index)
            if not self._closed:
                self._chunks.append((index, item))
        self._news.set()

    def _receive_acceptance(self, index: int, accepted: Future[int]) -> None:
        refusal = accepted.exception()
        if refusal is not None:
            self._open.discard(index)
            is_ours = isinstance(refusal, EngineError) and self._thread.error is None
            self._error = self._error or (refusal if is_ours and isinstance(refusal, Exception) else self._stopped())
            return
        self._ids[index] = accepted.result()
        if self._closed:
            self._thread.cancel(accepted.result())

    def _stopped(self) -> ApiError:
        state = self._host.state
        return ApiError(503, self._host.reason, code=f"engine_{state}", headers={"retry-after": "5"})

    async def _wait(self) -> None:
        """Until something has come."""
        if self._error is None:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
