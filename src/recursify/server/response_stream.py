"""Output of the engine on its way to one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from recursify.engine import RequestOutput, SamplingParams
from recursify.errors import EngineError
from recursify.server.engine_process import Accepted, EngineClient, OutputChunk

from .errors import ApiError

Chunks = dict[int, list[OutputChunk]]
"""Mapping from the indices of completions to their new chunks."""


class ResponseStream:
    """Completions for one HTTP request, which may submit several requests to the engine.

    They must end within ``timeout`` seconds; ``unavailable`` makes the error for an engine that has stopped.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[tuple[list[int], SamplingParams]],
        timeout: float,
        unavailable: Callable[[], ApiError],
    ) -> None:
        self._client, self._requests, self._unavailable = client, requests, unavailable
        self._num_unaccepted, self._open = len(requests), set(range(len(requests)))
        self._numbers: dict[int, int] = {}
        self._outputs: dict[int, RequestOutput] = {}
        self._chunks: Chunks = {}
        self._error: Exception | None = None
        self._arrival = asyncio.Event()
        late = ApiError(504, f"The completion was not ready within {timeout:g} seconds.", code="timeout")
        # One timer per request: a timeout of every wait would need a task per token.
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, late)

    async def submit(self) -> None:
        """Submit all requests, and wait until the engine has taken them; raise its refusal, or an ApiError."""
        for index, (prompt, params) in enumerate(self._requests):
            try:
                self._numbers[index] = self._client.submit(prompt, params, partial(self._receive, index))
            except EngineError as error:
                raise self._unavailable() from error
        while self._num_unaccepted:
            await self._wait()

    async def chunks(self) -> AsyncIterator[Chunks]:
        """Yield the chunks since the last time, until all completions have ended or :meth:`fail` is called."""
        while self._open or self._chunks:
            if self._chunks:
                chunks, self._chunks = self._chunks, {}
                yield chunks
            else:
                await self._wait()

    @property
    def finished(self) -> list[RequestOutput]:
        """Outputs of all completions, once :meth:`chunks` has ended."""
        return [self._outputs[index] for index in range(len(self._requests))]

    def fail(self, error: Exception) -> None:
        """End the stream with ``error``."""
        self._error = self._error or error
        self._arrival.set()

    def close(self) -> None:
        """Cancel all completions that have not ended."""
        self._timer.cancel()
        for index in self._open & set(self._numbers):
            self._client.cancel(self._numbers[index])
        self._open.clear()

    def _receive(self, index: int, item: Accepted | OutputChunk | Exception) -> None:
        """Handle an event of the request with this index."""
        if isinstance(item, Exception) or (isinstance(item, OutputChunk) and item.finish_reason is not None):
            self._open.discard(index)
        if isinstance(item, Exception):
            self.fail(item if self._client.is_running else self._unavailable())
        elif isinstance(item, OutputChunk):
            self._outputs[index] = item.output
            self._chunks.setdefault(index, []).append(item)
        else:
            self._num_unaccepted -= 1
        self._arrival.set()

    async def _wait(self) -> None:
        """Wait for the next event from the engine."""
        if self._error is None:
            self._arrival.clear()
            await self._arrival.wait()
        if self._error is not None:
            raise self._error
