"""An engine's own loop, for those who use it from another process: see ``link.py``."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recursify.engine.engine import Engine
from recursify.engine.request import RequestOutput, SamplingParams

from .protocol import Accepted, Connection, ConnectionClosed, EngineInfo, Failure, OutputDelta, Reply, Stopped
from .scoring import score_prompt
from .snapshot import EngineSnapshot

GAP_SECONDS, GATHER_SECONDS = 0.008, 0.1
"""An engine that had nothing to do begins when no request has come for the first time, after the second at the latest.
Rows that begin together stay at one depth, and share their calls of prelude, coda and head; one that has begun an
iteration before the others has those calls to itself for as long as it lives."""


def work(end: socket.socket, build: Callable[[], Engine]) -> None:
    """Make an engine and run it for whoever is at the other end of ``end``, until they have gone or it fails."""
    channel, worker = Connection(end), None
    try:
        worker = EngineProcess(build(), channel)
        worker.run()
    except ConnectionClosed:
        pass
    except BaseException as error:
        snapshot = None if worker is None else EngineSnapshot.of(worker.engine)
        try:
            channel.send([(0, Stopped(Failure.of(error), snapshot))])
        except ConnectionClosed:
            raise error from None
    finally:
        channel.close()


@dataclass
class _Told:
    """What has been sent of an answer."""

    number: int
    tokens: int = 0
    text: str = ""


class EngineProcess:
    """Takes commands between iterations, and sends what has come of all answers as one message per iteration.

    Args:
        engine: To run.
        channel: To whom it is run for.
    """

    def __init__(self, engine: Engine, channel: Connection) -> None:
        self.engine, self._channel = engine, channel
        self._ids: dict[int, int] = {}
        self._told: dict[int, _Told] = {}
        self._changed: dict[int, RequestOutput] = {}
        self._unscored: deque[tuple[int, Sequence[int], int]] = deque()
        self._unsent: list[tuple[int, Any]] = []
        engine.on_token = self._note

    def run(self) -> None:
        """Raises:
        ConnectionClosed: Nobody is there any more.
        """
        self._say(0, self._facts())
        while True:
            self._send()
            self._obey(wait=not self.engine.has_work and not self._unscored)
            if self._unscored:  # one between two iterations, so that answers go on
                number, ids, count = self._unscored.popleft()
                self._answer(number, partial(score_prompt, self.engine, ids, count))
                self._send()
            if self.engine.has_work:
                self.engine.step()
                self._collect()

    def _facts(self) -> EngineInfo:
        engine = self.engine
        return EngineInfo(
            config=engine.decoder.config,
            tokenizer=engine.tokenizer,
            kv=engine.kv,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.scheduler.max_num_seqs,
            num_pages=engine.kv_cache.pools[0].num_pages,
            num_recursions=engine.decoder.num_depths,
        )

    # --- Commands ------------------------------------------------------------------------------------------------

    def _obey(self, *, wait: bool) -> None:
        self._carry_out(self._channel.receive(None if wait else 0.0))
        if wait and self.engine.has_work:
            latest = time.monotonic() + GATHER_SECONDS
            while time.monotonic() < latest and (more := self._channel.receive(GAP_SECONDS)):
                self._carry_out(more)

    def _carry_out(self, commands: Sequence[Any]) -> None:
        for name, number, *arguments in commands:
            getattr(self, f"do_{name}")(number, *arguments)
        self._send()

    def do_submit(self, number: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """Take a request, which the other end calls ``number``."""
        try:
            request_id = self.engine.add(prompt, params)
        except Exception as error:  # a request that cannot be added is its caller's, and not the engine's end
            self._say(number, Failure.of(error))
            return
        self._ids[number] = request_id
        self._told[request_id] = _Told(number)
        self._say(number, Accepted())

    def do_cancel(self, number: int) -> None:
        """Nobody wants this answer any more; nothing is said of it either."""
        request_id = self._ids.pop(number, None)
        if request_id is not None:
            del self._told[request_id]
            self.engine.cancel(request_id)

    def do_snapshot(self, number: int) -> None:
        """Say how things are."""
        self._answer(number, partial(EngineSnapshot.of, self.engine))

    def do_reset_stats(self, number: int) -> None:
        """Count anew."""
        self._answer(number, self.engine.reset_stats)

    def do_score(self, number: int, ids: Sequence[int], count: int) -> None:
        """Score a prompt, in its turn."""
        self._unscored.append((number, ids, count))

    def do_forget(self, number: int) -> None:
        """Nobody waits for this score any more."""
        self._unscored = deque(each for each in self._unscored if each[0] != number)

    def _answer(self, number: int, find: Callable[[], Any]) -> None:
        try:
            self._say(number, Reply(find()))
        except Exception as error:
            self._say(number, Failure.of(error))

    # --- Answers -------------------------------------------------------------------------------------------------

    def _note(self, output: RequestOutput) -> None:
        if output.request_id in self._told:
            self._changed[output.request_id] = output

    def _collect(self) -> None:
        """What has come in this iteration, to be sent."""
        changed, self._changed = self._changed, {}
        for request_id, output in changed.items():
            told = self._told[request_id]
            # Decoded whole at its end, a text may be written otherwise than piece by piece.
            start = 0 if output.finished and not output.text.startswith(told.text) else len(told.text)
            news = OutputDelta(
                output.token_ids[told.tokens :],
                start,
                output.text[start:],
                output.depths[told.tokens :],
                None if output.logprobs is None else output.logprobs[told.tokens :],
                output.finish_reason,
                output.cached_tokens,
                output.preemptions,
            )
            self._say(told.number, news)
            told.tokens, told.text = len(output.token_ids), output.text
            if output.finished:
                del self._told[request_id], self._ids[told.number]

    def _say(self, number: int, what: Any) -> None:
        self._unsent.append((number, what))

    def _send(self) -> None:
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            self._channel.send(unsent)
