"""Output of the engine on its way to one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from recursify.engine import RequestOutput, SamplingParams
from recursify.errors import EngineError
from recursify.server.engine_process import Accepted, EngineClient, OutputChunk

from .errors import ApiError


class ResponseStream:
    """Completions for one HTTP request, which may submit several requests to the engine.

    Args:
        client: Client of the engine.
        requests: Prompts and sampling parameters.
        timeout: Seconds in which all completions must end.
        unavailable: Callable that makes the error for an engine that has stopped.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[tuple[list[int], SamplingParams]],
        *,
        timeout: float,
        unavailable: Callable[[], ApiError],
    ) -> None:
        self._client, self._requests, self._unavailable = client, requests, unavailable
        self._numbers: dict[int, int] = {}
        self._num_unaccepted = len(requests)
        self._open = set(range(len(requests)))
        self._chunks: list[tuple[int, OutputChunk]] = []
        self._error: Exception | None = None
        self._arrival = asyncio.Event()
        late = ApiError(504, f"The completion was not ready within {timeout:g} seconds.", code="timeout")
        # One timer per request: a timeout of every wait would need a task per token.
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, late)
        self._outputs: dict[int, RequestOutput] = {}

    # --- For the handler -----------------------------------------------------------------------------------------

    async def submit(self) -> None:
        """Submit all requests, and wait until the engine has taken them.

        Raises:
            EngineError: The engine has refused one.
            ApiError: The engine has stopped.
        """
        for index, (prompt, params) in enumerate(self._requests):
            try:
                self._numbers[index] = self._client.submit(prompt, params, partial(self._receive, index))
            except EngineError as error:
                raise self._unavailable() from error
        while self._num_unaccepted:
            await self._wait()

    async def chunks(self) -> AsyncIterator[list[tuple[int, OutputChunk]]]:
        """Yield the chunks since the last time, each with the index of its completion, until all have ended.

        Raises:
            ApiError: The engine has stopped, the server shuts down, or the time is over.
        """
        while self._open or self._chunks:
            if self._chunks:
                chunks, self._chunks = self._chunks, []
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

    # --- From the engine -----------------------------------------------------------------------------------------

    def _receive(self, index: int, item: Accepted | OutputChunk | Exception) -> None:
        """Listen to the request with this index."""
        if isinstance(item, Exception):
            self._open.discard(index)
            self.fail(item if self._client.is_running else self._unavailable())
            return
        if isinstance(item, OutputChunk):
            self._outputs[index] = item.output
            if item.finish_reason is not None:
                self._open.discard(index)
            self._chunks.append((index, item))
        else:
            self._num_unaccepted -= 1
        self._arrival.set()

    async def _wait(self) -> None:
        """Wait for the next item from the engine."""
        if self._error is None:
            self._arrival.clear()
            await self._arrival.wait()
        if self._error is not None:
            raise self._error
