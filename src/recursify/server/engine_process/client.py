"""Client of an engine that runs in another process or in a thread, for use in an event loop.

An engine in a process of its own has its own interpreter lock, and its crash does not end the client's process. A
socket pair connects the two: commands go one way, and the new output of all requests comes back as one message per
iteration. Each end notices when the other closes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, Self, cast

from recursify.engine.checks import encode
from recursify.engine.engine import Engine
from recursify.engine.request import RequestOutput, SamplingParams
from recursify.errors import EngineError

from .process import serve_engine
from .protocol import Accepted, EngineFailure, EngineInfo, OutputChunk, OutputDelta, pack, unpack
from .snapshot import EngineSnapshot

logger = logging.getLogger(__name__)

END_SECONDS = 10.0
"""Seconds in which an engine must end after the client closes, at most one iteration; then its process is killed."""

Item = Accepted | OutputChunk | Exception
"""Event of a request: the engine has taken it, has new output of it, or has refused or ended it with an error."""
Listener = Callable[[Item], None]
"""Callback in the event loop for the events of a request."""
OnStop = Callable[[Exception], None] | None


@dataclass
class PendingRequest:
    """A request that has not ended, and its output so far."""

    listener: Listener
    output: RequestOutput

    def notify(self, item: Item) -> None:
        """Call the listener; its errors are logged, so that other requests go on."""
        try:
            self.listener(item)
        except Exception:
            logger.exception("The listener of request %d failed.", self.output.request_id)

    def append(self, delta: OutputDelta) -> OutputChunk:
        """Add ``delta`` to the output, and return it as a chunk."""
        output, new, num_characters = self.output, delta.new, len(self.output.text)
        output.token_ids += new.token_ids
        output.depths += new.depths
        output.text = output.text[: delta.start] + new.text
        if output.logprobs is not None:
            output.logprobs += new.logprobs or []
        output.finish_reason = new.finish_reason
        output.cached_tokens, output.preemptions = new.cached_tokens, new.preemptions
        text = output.text[num_characters:]
        return OutputChunk(new.token_ids, text, new.depths, new.logprobs, new.finish_reason, output)


class EngineClient(asyncio.Protocol):
    """Client of an engine, made by :meth:`open` and used in one event loop.

    Attributes:
        info: Properties of the engine.
        error: RecursifyError or EngineFailure that has stopped the engine, or None.
        last_snapshot: Most recent counts of the engine.
    """

    info: EngineInfo

    def __init__(self, on_stop: OnStop = None) -> None:
        self.error: Exception | None = None
        self.last_snapshot = EngineSnapshot()
        self._on_stop = on_stop
        self._buffer, self._numbers = bytearray(), itertools.count(1)
        self._requests: dict[int, PendingRequest] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._runner: SpawnProcess | threading.Thread | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def open(cls, build: Callable[[], Engine], *, own_process: bool = True, on_stop: OnStop = None) -> Self:
        """Start an engine, and wait until it takes requests. Cancelling the wait ends the engine.

        Args:
            build: Callable that makes the engine. For a new process it is pickled: a function of a module, or a
                ``functools.partial`` of one.
            own_process: Run the engine in a new process, which shares only the environment; otherwise in a thread.
            on_stop: Callback for an engine that stops unasked, called with the reason after all listeners.

        Raises:
            RecursifyError: ``build`` raised one.
            EngineFailure: ``build`` raised another error, or the process ended.
        """
        client = cls(on_stop)
        ours, theirs = socket.socketpair()
        try:
            client._start(theirs, build, own_process)
            await client._loop.create_connection(lambda: client, sock=ours)
            client.info = await client._ready
        except BaseException:
            if client._transport is None:
                ours.close()
            await client.close(0.0)
            raise
        return client

    def _start(self, theirs: socket.socket, build: Callable[[], Engine], own_process: bool) -> None:
        options: dict[str, Any] = {"target": serve_engine, "args": (theirs, build), "name": "recursify-engine"}
        if not own_process:
            self._runner = threading.Thread(**options, daemon=True)
            self._runner.start()
            return
        process = multiprocessing.get_context("spawn").Process(**options, daemon=True)
        try:
            with _signals_blocked():
                process.start()
        finally:
            theirs.close()
        self._runner = process
        # Exit handlers run in reverse order: this one kills the engine before multiprocessing's handler joins it.
        atexit.register(process.kill)

    # --- Requests and calls --------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """True while the engine takes requests."""
        return self._ready.done() and self.error is None and not self._is_closed

    @property
    def pid(self) -> int | None:
        """Id of the engine's process; None in a thread."""
        return getattr(self._runner, "pid", None)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams, listener: Listener) -> int:
        """Submit a request of a text or token ids, and return its number.

        Raises:
            EngineError: The engine has stopped.
        """
        if isinstance(prompt, str):
            prompt = encode(prompt, self.info.tokenizer, self.info.config.vocab_size)
        number = self._send("submit", list(prompt), params)
        logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self._requests[number] = PendingRequest(listener, RequestOutput(number, list(prompt), logprobs=logprobs))
        return number

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[OutputChunk]:
        """Submit a request of a text or token ids, and yield its output; closing the iterator cancels the request.

        Raises:
            RecursifyError: The engine has refused the request, or stopped.
            EngineFailure: The engine has failed.
        """
        items: asyncio.Queue[Item] = asyncio.Queue()
        number = self.submit(prompt, params or SamplingParams(), items.put_nowait)
        try:
            while True:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, OutputChunk):
                    yield item
                    if item.finish_reason is not None:
                        return
        finally:
            self.cancel(number)

    def cancel(self, number: int) -> None:
        """Cancel a request; its listener is not called again."""
        if self._requests.pop(number, None) is not None and self.is_running:
            self._write(("cancel", number))

    async def snapshot(self) -> EngineSnapshot:
        """Read the counts of the engine between two iterations; raise an EngineError if it has stopped."""
        self.last_snapshot = await self._call("snapshot")
        return self.last_snapshot

    async def score(self, ids: Sequence[int], count: int) -> list[dict[int, float] | None]:
        """Call :func:`~recursify.server.engine_process.scoring.score_prompt` between two iterations."""
        return await self._call("score", list(ids), count)

    async def reset_stats(self) -> None:
        """Reset the counts of the engine."""
        await self._call("reset_stats")

    async def close(self, timeout: float = END_SECONDS) -> None:
        """End the engine and wait for it; a process that has not ended after ``timeout`` seconds is killed."""
        self._is_closed = True
        self._fail_all(EngineError("The engine was closed."))
        if self._transport is not None:
            self._transport.close()
        if self._ending is not None:
            await self._ending
        elif self._runner is not None:
            await asyncio.to_thread(self._join, timeout)

    async def _call(self, name: str, *arguments: Any) -> Any:
        number = self._send(name, *arguments)
        reply = self._calls[number] = self._loop.create_future()
        try:
            return await reply
        finally:
            if self._calls.pop(number, None) is not None and name == "score" and self.is_running:
                self._write(("forget", number))

    def _send(self, name: str, *arguments: Any) -> int:
        if not self.is_running:
            raise EngineError(f"The engine has stopped: {self.error or 'it was closed'}")
        number = next(self._numbers)
        self._write((name, number, *arguments))
        return number

    def _write(self, command: tuple[Any, ...]) -> None:
        """Write without waiting: the transport buffers data that the socket does not take."""
        assert self._transport is not None
        if not self._transport.is_closing():  # otherwise connection_lost follows, and fails all requests
            self._transport.write(pack(command))

    # --- Callbacks of the event loop -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        for message in unpack(self._buffer):
            for number, item in message:
                self._receive(number, item)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_closed:
            self._ending = self._loop.create_task(self._find_reason(error))

    def _receive(self, number: int, item: Any) -> None:
        if (request := self._requests.get(number)) is not None:
            event: Item = request.append(item) if isinstance(item, OutputDelta) else item
            if request.output.finished or isinstance(event, Exception):
                del self._requests[number]
            request.notify(event)
        elif number in self._calls:
            _settle(self._calls.pop(number), item)
        elif isinstance(item, EngineInfo):
            _settle(self._ready, item)
        elif isinstance(item, EngineSnapshot):  # the last counts, before the failure of the engine itself
            self.last_snapshot = item
        elif number == 0:
            self._stop(item)

    # --- End of the engine ---------------------------------------------------------------------------------------

    async def _find_reason(self, error: Exception | None) -> None:
        """Wait for the end of the engine, which has closed the connection, and report the reason."""
        await asyncio.to_thread(self._join, END_SECONDS)
        self._stop(_failure(self._runner, error))

    def _join(self, timeout: float) -> None:
        runner = self._runner
        assert runner is not None
        runner.join(timeout)
        if isinstance(runner, SpawnProcess):
            if runner.is_alive():
                runner.kill()
                runner.join()
            atexit.unregister(runner.kill)

    def _stop(self, error: Exception) -> None:
        """Handle an engine that has stopped unasked; only the first reason counts."""
        if self.error is not None or self._is_closed:
            return
        self.error = error
        self._fail_all(error)
        if not self._ready.done():
            self._ready.set_exception(error)
        elif self._on_stop is not None:
            self._on_stop(error)

    def _fail_all(self, error: Exception) -> None:
        requests, self._requests = self._requests, {}
        calls, self._calls = self._calls, {}
        for request in requests.values():
            request.notify(error)
        for reply in calls.values():
            _settle(reply, EngineError(f"The engine has stopped: {error}"))


def _settle(reply: asyncio.Future[Any], result: Any) -> None:
    """Complete a future with the engine's result or error, unless it was cancelled."""
    if not reply.done():
        complete = reply.set_exception if isinstance(result, Exception) else reply.set_result
        complete(result)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM; a process started meanwhile has them blocked from its first instruction on.

    A terminal sends Ctrl-C to both processes, a service manager SIGTERM, but only the client decides when to end.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # it unblocks both signals where it is started together with a process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _failure(runner: SpawnProcess | threading.Thread | None, error: Exception | None) -> EngineFailure:
    """Describe the end of an engine that sent no reason; ``error`` is that of the connection."""
    code = getattr(runner, "exitcode", None)
    if not code:
        failure = EngineFailure("connection lost", "The connection to the engine broke, and the engine gave no reason.")
        failure.__cause__ = error
        return failure
    if code > 0:
        return EngineFailure(f"exit code {code}", f"The engine's process ended with exit code {code}.")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    message = f"The engine's process was killed by {name}."
    if name == "SIGKILL":
        message += " If nobody sent it, the system is out of memory: see the kernel's log."
    return EngineFailure(f"killed by {name}", message)
