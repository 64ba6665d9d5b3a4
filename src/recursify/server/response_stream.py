"""Answers on their way from the engine to a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from recursify.engine import RequestOutput, SamplingParams
from recursify.errors import EngineError
from recursify.server.engine_process import Accepted, EngineClient, OutputChunk

from .errors import ApiError

if TYPE_CHECKING:
    from .engine_supervisor import EngineSupervisor


class ResponseStream:
    """The answers to one call of the server, which may ask the engine several things.

    Args:
        host: Of the engine; knows why it has stopped.
        link: To the engine.
        asked: Prompts and parameters.

    Attributes:
        outputs: By index, all that has come of an answer.
    """

    def __init__(
        self,
        host: EngineSupervisor,
        link: EngineClient,
        asked: Sequence[tuple[list[int], SamplingParams]],
    ) -> None:
        self._host, self._link, self._asked = host, link, asked
        self._numbers: dict[int, int] = {}
        self._unaccepted = len(asked)
        self._open = set(range(len(asked)))
        self._chunks: list[tuple[int, OutputChunk]] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()
        seconds = host.settings.request_seconds
        late = ApiError(504, f"The answer was not ready within {seconds:g} seconds.", code="timeout")
        # One timer per request: a limit to every wait would be a task per token.
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, late)
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
                self._numbers[index] = self._link.submit(prompt, params, partial(self._receive, index))
            except EngineError as error:
                raise self._host.unavailable() from error
        while self._unaccepted:
            await self._wait()

    async def chunks(self) -> AsyncIterator[list[tuple[int, OutputChunk]]]:
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
        self._timer.cancel()
        for index in self._open & set(self._numbers):
            self._link.cancel(self._numbers[index])
        self._open.clear()

    # --- From the engine -----------------------------------------------------------------------------------------

    def _receive(self, index: int, item: Accepted | OutputChunk | Exception) -> None:
        """What is said of the answer ``index``: that it is taken or refused, a chunk, or the engine's own end."""
        if isinstance(item, Exception):
            self._open.discard(index)
            self.fail(item if self._link.is_running else self._host.unavailable())
            return
        if isinstance(item, OutputChunk):
            self.outputs[index] = item.output
            if item.finish_reason is not None:
                self._open.discard(index)
            self._chunks.append((index, item))
        else:
            self._unaccepted -= 1
        self._news.set()

    async def _wait(self) -> None:
        """Until something has come."""
        if self._error is None:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
