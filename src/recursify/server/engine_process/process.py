"""Loop of an engine process: take commands between iterations, send the new output of all requests after each."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from recursify.engine.engine import Engine
from recursify.engine.request import RequestOutput, SamplingParams

from .protocol import Accepted, Connection, ConnectionClosed, EngineInfo, OutputDelta, portable_error
from .scoring import score_prompt
from .snapshot import EngineSnapshot

GAP_SECONDS, GATHER_SECONDS = 0.008, 0.1
"""An idle engine starts when no request has arrived for the first time, or after the second. Requests that start
together stay at the same depth and share calls of prelude, coda and head; one that starts an iteration earlier needs
those calls for itself until it ends."""


def serve_engine(end: socket.socket, build: Callable[[], Engine]) -> None:
    """Make an engine and run it for the client at the other end of ``end``, until the client closes or it fails."""
    connection, process = Connection(end), None
    try:
        process = EngineProcess(build(), connection)
        process.run()
    except ConnectionClosed:
        pass
    except BaseException as error:
        snapshots = [] if process is None else [(0, EngineSnapshot.of(process.engine))]
        try:
            connection.send([*snapshots, (0, portable_error(error))])
        except ConnectionClosed:
            raise error from None
    finally:
        connection.close()


@dataclass
class SentOutput:
    """The number of tokens and the text that have been sent of the request that the client calls ``number``."""

    number: int
    tokens: int = 0
    text: str = ""

    def advance(self, output: RequestOutput) -> OutputDelta:
        """Mark all of ``output`` as sent, and return what is new."""
        start = 0 if output.finished and not output.text.startswith(self.text) else len(self.text)
        new = replace(
            output,
            prompt_ids=[],
            token_ids=output.token_ids[self.tokens :],
            text=output.text[start:],
            depths=output.depths[self.tokens :],
            logprobs=None if output.logprobs is None else output.logprobs[self.tokens :],
        )
        self.tokens, self.text = len(output.token_ids), output.text
        return OutputDelta(start, new)


class EngineProcess:
    """Runs an engine for the client at the other end of a connection."""

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self.engine, self._connection = engine, connection
        self._ids: dict[int, int] = {}
        self._sent: dict[int, SentOutput] = {}
        self._changed: dict[int, RequestOutput] = {}
        self._unscored: deque[tuple[int, Sequence[int], int]] = deque()
        self._outbox: list[tuple[int, Any]] = []
        engine.on_token = self._mark_changed

    def run(self) -> None:
        """Run until ConnectionClosed is raised."""
        self._post(0, EngineInfo.of(self.engine))
        while True:
            self._flush()
            self._receive_commands(wait=not self.engine.has_work and not self._unscored)
            if self._unscored:  # one per iteration, so that running requests go on
                number, ids, count = self._unscored.popleft()
                self._reply(number, partial(score_prompt, self.engine, ids, count))
                self._flush()
            if self.engine.has_work:
                self.engine.step()
                self._post_deltas()

    def _receive_commands(self, *, wait: bool) -> None:
        self._run_commands(self._connection.receive(None if wait else 0.0))
        if wait and self.engine.has_work:
            latest = time.monotonic() + GATHER_SECONDS
            while time.monotonic() < latest and (commands := self._connection.receive(GAP_SECONDS)):
                self._run_commands(commands)

    def _run_commands(self, commands: Sequence[Any]) -> None:
        for name, number, *arguments in commands:
            getattr(self, f"do_{name}")(number, *arguments)
        self._flush()

    def do_submit(self, number: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """Add a request, which the client calls ``number``."""

        def add() -> Accepted:
            request_id = self._ids[number] = self.engine.add(prompt, params)
            self._sent[request_id] = SentOutput(number)
            return Accepted()

        self._reply(number, add)

    def do_cancel(self, number: int) -> None:
        """Cancel a request, without a message about it."""
        request_id = self._ids.pop(number, None)
        if request_id is not None:
            del self._sent[request_id]
            self.engine.cancel(request_id)

    def do_snapshot(self, number: int) -> None:
        self._reply(number, partial(EngineSnapshot.of, self.engine))

    def do_reset_stats(self, number: int) -> None:
        self._reply(number, self.engine.reset_stats)

    def do_score(self, number: int, ids: Sequence[int], count: int) -> None:
        """Queue a prompt for scoring."""
        self._unscored.append((number, ids, count))

    def do_forget(self, number: int) -> None:
        """Drop a prompt from the queue for scoring."""
        self._unscored = deque(entry for entry in self._unscored if entry[0] != number)

    def _reply(self, number: int, compute: Callable[[], Any]) -> None:
        """Send a result, or the error of this call alone; the engine goes on."""
        try:
            self._post(number, compute())
        except Exception as error:
            self._post(number, portable_error(error))

    def _mark_changed(self, output: RequestOutput) -> None:
        if output.request_id in self._sent:
            self._changed[output.request_id] = output

    def _post_deltas(self) -> None:
        """Queue the new output of this iteration."""
        changed, self._changed = self._changed, {}
        for request_id, output in changed.items():
            sent = self._sent[request_id]
            self._post(sent.number, sent.advance(output))
            if output.finished:
                del self._sent[request_id], self._ids[sent.number]

    def _post(self, number: int, item: Any) -> None:
        self._outbox.append((number, item))

    def _flush(self) -> None:
        if self._outbox:
            messages, self._outbox = self._outbox, []
            self._connection.send(messages)
