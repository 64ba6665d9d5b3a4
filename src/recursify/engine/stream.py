"""An engine in a thread of its own, and answers as they come: what a server is built on."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from recursify.errors import EngineError

from .engine import Engine
from .request import FinishReason, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamChunk:
    """What has come of an answer since the last chunk.

    Attributes:
        request_id: Of the request.
        token_ids: New tokens; none where a chunk only ends the answer.
        text: New text.
        depths: Per token, the last recursion of the forward that it was read from.
        logprobs: Per token ``{token id: log-probability}``, if asked for.
        finish_reason: In the last chunk.
        output: All of the answer so far; not to be changed.
    """

    request_id: int
    token_ids: list[int]
    text: str
    depths: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    output: RequestOutput


class EngineThread:
    """Runs an engine for callers of any thread.

    The engine must be used through this alone, which takes its ``on_token``. If it fails, every request is told so, and
    no other is taken.

    Args:
        engine: To run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self._commands: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._listeners: dict[int, Callable[[StreamChunk | BaseException], None]] = {}
        self._told: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._closing = False
        engine.on_token = self._tell
        self._thread = threading.Thread(target=self._run, name="recursify-engine", daemon=True)
        self._thread.start()

    # --- For any thread ------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self.error is None and not self._closing

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        listener: Callable[[StreamChunk | BaseException], None],
    ) -> Future[int]:
        """Ask; ``listener`` is called in the engine's thread, with every chunk or with what went wrong.

        Returns:
            The request's id, or the :class:`~recursify.errors.EngineError` that refused it.
        """
        accepted: Future[int] = Future()

        def add() -> None:
            # Whoever waited may have gone; setting the result of a cancelled future would end this thread.
            if not accepted.set_running_or_notify_cancel():
                return
            if self.error is not None:
                accepted.set_exception(EngineError(f"The engine has stopped: {self.error}"))
                return
            try:
                request_id = self.engine.add(prompt, params)
            except Exception as error:  # a request that cannot be added is its caller's, and not the engine's end
                accepted.set_exception(error)
                return
            self._listeners[request_id] = listener
            self._told[request_id] = (0, 0)
            accepted.set_result(request_id)

        self._command(add)
        return accepted

    def cancel(self, request_id: int) -> None:
        """End a request, if it has not ended."""
        if self.error is None and self._thread.is_alive():
            self._commands.put(lambda: self._cancel(request_id))

    def call(self, function: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread call ``function`` between two iterations, to read its state."""
        result: Future[Any] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(function(self.engine))
            except Exception as error:
                result.set_exception(error)

        self._command(run)
        return result

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[StreamChunk]:
        """An answer as it comes. Whoever stops listening cancels the request.

        Raises:
            EngineError: The request was refused, or the engine has stopped.
        """
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[StreamChunk | BaseException] = asyncio.Queue()

        def listen(chunk: StreamChunk | BaseException) -> None:
            if not loop.is_closed():  # whoever listened has gone, and the request is being cancelled
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        accepted = self.submit(prompt, params, listen)
        try:
            request_id = await asyncio.wrap_future(accepted)
        except asyncio.CancelledError:
            accepted.add_done_callback(self._cancel_accepted)
            raise
        finished = False
        try:
            while not finished:
                chunk = await chunks.get()
                if isinstance(chunk, BaseException):
                    finished = True
                    raise EngineError(f"The engine has stopped: {chunk}") from chunk
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                self.cancel(request_id)

    def _cancel_accepted(self, accepted: Future[int]) -> None:
        """End a request that was taken when whoever asked had gone."""
        if not accepted.cancelled() and accepted.exception() is None:
            self.cancel(accepted.result())

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests; finish those there are, or cancel them. Whether the thread has ended in time."""
        with self._lock:
            self._closing = True
        if not drain:
            self._commands.put(self._cancel_all)
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closing:
                raise EngineError("The engine is closing and takes no more requests.")
            if self.error is not None or not self._thread.is_alive():
                raise EngineError(f"The engine has stopped: {self.error}")
            self._commands.put(command)

    # --- In the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            closing = False
            while not (closing and not self.engine.has_work):
                closing |= self._obey(wait=not self.engine.has_work and not closing)
                if self.engine.has_work:
                    self.engine.step()
        except BaseException as error:
            self._fail(error)

    def _obey(self, *, wait: bool) -> bool:
        """Carry out what was commanded; whether the end was."""
        closing = False
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return closing
            if command is None:
                closing = True
            else:
                command()
            wait = False

    def _tell(self, output: RequestOutput) -> None:
        listener = self._listeners.get(output.request_id)
        if listener is None:
            return
        tokens, characters = self._told[output.request_id]
        self._told[output.request_id] = len(output.token_ids), len(output.text)
        if output.finished:
            del self._listeners[output.request_id], self._told[output.request_id]
        logprobs = None if output.logprobs is None else output.logprobs[tokens:]
        chunk = StreamChunk(
            output.request_id,
            output.token_ids[tokens:],
            output.text[characters:],
            output.depths[tokens:],
            logprobs,
            output.finish_reason,
            output,
        )
        try:
            listener(chunk)
        except Exception:
            logger.exception("The listener of request %d failed. Its request is cancelled.", output.request_id)
            if self._listeners.pop(output.request_id, None) is not None:
                self._commands.put(lambda: self._cancel(output.request_id))

    def _cancel(self, request_id: int) -> None:
        self.engine.cancel(request_id)

    def _cancel_all(self) -> None:
        for request_id in list(self.engine.requests):
            self.engine.cancel(request_id)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = error
        listeners, self._listeners = self._listeners, {}
        for request_id, listener in listeners.items():
            try:
                listener(error)
            except Exception:
                logger.exception("The listener of request %d failed.", request_id)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command()
