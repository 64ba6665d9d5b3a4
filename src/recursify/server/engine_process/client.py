"""An engine elsewhere, for an event loop: in a process of its own, or in a thread.

In a process of its own an engine shares no interpreter lock with those who ask, and its end, whatever it is, is not
theirs. The two are connected by a pair of sockets: small commands go one way, and what has come of all answers comes
back as one message per iteration. Either end notices when the other has gone.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, cast

from recursify.engine.engine import Engine
from recursify.engine.request import RequestOutput, SamplingParams
from recursify.errors import EngineError

from .process import work
from .protocol import Accepted, EngineFailure, EngineInfo, Failure, Frames, OutputChunk, OutputDelta, Stopped, pack
from .snapshot import EngineSnapshot

logger = logging.getLogger(__name__)

END_SECONDS = 10.0
"""In which an engine that is let go ends by itself: an iteration, at most. Then its process is killed."""

Listener = Callable[[Accepted | OutputChunk | Exception], None]
"""Is called in the event loop: when the engine has taken a request, with every chunk of the answer, and with the error
that refused or ended it."""


@dataclass
class _Answer:
    listener: Listener
    output: RequestOutput

    def tell(self, what: Accepted | OutputChunk | Exception) -> None:
        try:
            self.listener(what)
        except Exception:  # one listener's error is not to lose the others' news
            logger.exception("The listener of answer %d failed.", self.output.request_id)


class EngineClient(asyncio.Protocol):
    """Asks an engine that runs elsewhere. To be made by :meth:`open`, and used in one event loop.

    Attributes:
        facts: What the engine says of itself.
        error: Why it has stopped, if it has: one of our errors, or an
            :class:`~recursify.server.engine_process.protocol.EngineFailure`.
        last_snapshot: The last that was seen of its counts.
        pid: Of its process; None in a thread.
    """

    facts: EngineInfo

    def __init__(self, on_stop: Callable[[Exception], None] | None = None) -> None:
        self.error: Exception | None = None
        self.last_snapshot = EngineSnapshot()
        self._on_stop = on_stop
        self._frames, self._numbers = Frames(), itertools.count(1)
        self._answers: dict[int, _Answer] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._runner: SpawnProcess | threading.Thread | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        build: Callable[[], Engine],
        *,
        own_process: bool = True,
        on_stop: Callable[[Exception], None] | None = None,
    ) -> EngineClient:
        """Start an engine, and wait until it can be asked. Whoever stops waiting ends it.

        Args:
            build: Makes the engine; for a process of its own it is pickled, so it is a function of a module, or a
                ``functools.partial`` of one.
            own_process: Run it in a new process, which has nothing of this one but its environment; else in a thread.
            on_stop: Called when the engine stops unasked, with the reason, after all who waited have been told.

        Raises:
            RecursifyError: The engine cannot be made, by our own error.
            EngineFailure: It cannot be made, by another one, or its process has ended.
        """
        link = cls(on_stop)
        ours, theirs = socket.socketpair()
        try:
            link._start(theirs, build, own_process)
            await link._loop.create_connection(lambda: link, sock=ours)
            link.facts = await link._ready
        except BaseException:
            if link._transport is None:
                ours.close()
            await link.close(0.0)
            raise
        return link

    def _start(self, theirs: socket.socket, build: Callable[[], Engine], own_process: bool) -> None:
        if not own_process:
            self._runner = threading.Thread(target=work, args=(theirs, build), name="recursify-engine", daemon=True)
            self._runner.start()
            return
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=work, args=(theirs, build), name="recursify-engine", daemon=True)
        try:
            with _signals_blocked():
                process.start()
        finally:
            theirs.close()
        self._runner = process
        # However this process ends; later than what multiprocessing has registered, so before it waits for its own.
        atexit.register(process.kill)

    # --- Asking --------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._ready.done() and self.error is None and not self._is_closed

    @property
    def pid(self) -> int | None:
        return getattr(self._runner, "pid", None)

    def submit(self, prompt: Sequence[int], params: SamplingParams, listener: Listener) -> int:
        """Ask for an answer to ``prompt``, token ids; returns its number.

        Raises:
            EngineError: The engine has stopped.
        """
        number = self._send("submit", list(prompt), params)
        logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self._answers[number] = _Answer(listener, RequestOutput(number, list(prompt), logprobs=logprobs))
        return number

    def cancel(self, number: int) -> None:
        """Nobody wants the answer of that number any more; its listener is not called again."""
        if self._answers.pop(number, None) is not None and self.is_running:
            self._write(("cancel", number))

    async def snapshot(self) -> EngineSnapshot:
        """Its counts, between two iterations.

        Raises:
            EngineError: The engine has stopped.
        """
        self.last_snapshot = await self._ask("snapshot")
        return self.last_snapshot

    async def score(self, ids: Sequence[int], count: int) -> list[dict[int, float] | None]:
        """What :func:`~recursify.server.engine_process.scoring.score_prompt` says of ``ids``, in between iterations.

        Raises:
            EngineError: The engine has stopped.
        """
        return await self._ask("score", list(ids), count)

    async def reset_stats(self) -> None:
        """Have the engine count anew."""
        await self._ask("reset_stats")

    async def close(self, seconds: float = END_SECONDS) -> None:
        """End the engine, whatever it is at, and wait for it; a process that does not end in time is killed."""
        self._is_closed = True
        self._tell_all(EngineError("The engine was closed."))
        if self._transport is not None:
            self._transport.close()
        if self._ending is not None:
            await self._ending
        elif self._runner is not None:
            await asyncio.to_thread(self._join, seconds)

    async def _ask(self, name: str, *arguments: Any) -> Any:
        number = self._send(name, *arguments)
        answer = self._questions[number] = self._loop.create_future()
        try:
            return await answer
        finally:
            if self._questions.pop(number, None) is not None and name == "score" and self.is_running:
                self._write(("forget", number))

    def _send(self, name: str, *arguments: Any) -> int:
        if not self.is_running:
            raise EngineError(f"The engine has stopped: {self.error or 'it was closed'}")
        number = next(self._numbers)
        self._write((name, number, *arguments))
        return number

    def _write(self, command: tuple[Any, ...]) -> None:
        """Never waits: what the socket does not take is kept by the transport."""
        assert self._transport is not None
        if not self._transport.is_closing():  # else its end is about to be known, and all are told
            self._transport.write(pack(command))

    # --- Hearing, as the event loop calls it ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            for number, what in message:
                self._hear(number, what)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_closed:
            self._ending = self._loop.create_task(self._find_out(error))

    def _hear(self, number: int, what: Any) -> None:
        if isinstance(what, Stopped):
            self.last_snapshot = what.snapshot or self.last_snapshot
            self._stop(what.failure.exception)
        elif isinstance(what, EngineInfo):
            if not self._ready.done():
                self._ready.set_result(what)
        elif number in self._answers:
            self._hear_of_answer(number, what)
        elif number in self._questions:
            question = self._questions.pop(number)
            if not question.done():
                if isinstance(what, Failure):
                    question.set_exception(what.exception)
                else:
                    question.set_result(what.value)

    def _hear_of_answer(self, number: int, what: Accepted | OutputDelta | Failure) -> None:
        answer = self._answers[number]
        if isinstance(what, OutputDelta):
            chunk = self._chunk(number, answer.output, what)
            if answer.output.finished:
                del self._answers[number]
            answer.tell(chunk)
        elif isinstance(what, Failure):
            del self._answers[number]
            answer.tell(what.exception)
        else:
            answer.tell(what)

    @staticmethod
    def _chunk(number: int, output: RequestOutput, news: OutputDelta) -> OutputChunk:
        """``news``, which ``output`` gets to have."""
        told = len(output.text)
        output.token_ids += news.token_ids
        output.depths += news.depths
        output.text = output.text[: news.start] + news.text
        if output.logprobs is not None:
            output.logprobs += news.logprobs or []
        output.finish_reason = news.finish_reason
        output.cached_tokens, output.preemptions = news.cached_tokens, news.preemptions
        text = output.text[told:]
        return OutputChunk(number, news.token_ids, text, news.depths, news.logprobs, news.finish_reason, output)

    # --- Its end -------------------------------------------------------------------------------------------------

    async def _find_out(self, broken: Exception | None) -> None:
        """The other end has gone: why?"""
        await asyncio.to_thread(self._join, END_SECONDS)
        self._stop(_reason(self._runner, broken))

    def _join(self, seconds: float) -> None:
        runner = self._runner
        assert runner is not None
        runner.join(seconds)
        if isinstance(runner, SpawnProcess):
            if runner.is_alive():
                runner.kill()
                runner.join()
            atexit.unregister(runner.kill)

    def _stop(self, error: Exception) -> None:
        """The engine has stopped unasked; the first reason is the one that counts."""
        if self.error is not None or self._is_closed:
            return
        self.error = error
        self._tell_all(error)
        if not self._ready.done():
            self._ready.set_exception(error)
        elif self._on_stop is not None:
            self._on_stop(error)

    def _tell_all(self, error: Exception) -> None:
        answers, self._answers = self._answers, {}
        questions, self._questions = self._questions, {}
        for answer in answers.values():
            answer.tell(error)
        for question in questions.values():
            if not question.done():
                question.set_exception(EngineError(f"The engine has stopped: {error}"))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is blocked here is blocked in a process that starts meanwhile, from its first moment on.

    A terminal sends Ctrl-C to both processes, a service manager SIGTERM: the end is for this one to say.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # where it starts together with a process, it unblocks both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reason(runner: SpawnProcess | threading.Thread | None, broken: Exception | None) -> EngineFailure:
    """Why an engine has ended that did not say so; ``broken`` is what the link has to say."""
    code = getattr(runner, "exitcode", None)
    if not code:
        failure = EngineFailure("the link to it broke", "The link to the engine broke, and it said nothing of why.")
        failure.__cause__ = broken
        return failure
    if code > 0:
        return EngineFailure(f"exit code {code}", f"The engine's process has ended with exit code {code}.")
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    message = f"The engine's process was killed by {name}."
    if name == "SIGKILL":
        message += " If nobody did that, the system did, for want of memory: see the kernel's log."
    return EngineFailure(f"killed by {name}", message)
