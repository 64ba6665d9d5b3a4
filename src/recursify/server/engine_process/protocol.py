"""What an engine and those who use it from elsewhere say to one another: frames of pickled Python over a socket.

Both ends are this program's own, started by one another, so that nothing foreign is ever unpickled.
"""

from __future__ import annotations

import pickle
import selectors
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from recursify.engine.request import FinishReason, RequestOutput
from recursify.errors import RecursifyError

from .snapshot import EngineSnapshot

LENGTH_BYTES = 8
"""Before each message."""
READ_BYTES = 2**16


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself when it can be asked.

    Attributes:
        config: Of the model.
        tokenizer: Of the model, or None.
        kv: Of :data:`~recursify.engine.KV_MODES`.
        max_model_len: Tokens of a request, prompt and answer.
        max_num_seqs: That run at once.
        num_pages: Of keys and values, in the first pool.
        num_recursions: Of the model.
    """

    config: Any
    tokenizer: Any
    kv: str
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    num_recursions: int


class Accepted(NamedTuple):
    """The engine has taken a request."""


class OutputDelta(NamedTuple):
    """What has come of an answer.

    Attributes:
        token_ids: New tokens.
        start: How many characters of the text so far stay; all, unless the end of the text shows how it is written.
        text: What follows them.
        depths: Per new token.
        logprobs: Per new token, if asked for.
        finish_reason: If the answer has ended.
        cached_tokens: Of the prompt.
        preemptions: Of the request.
    """

    token_ids: list[int]
    start: int
    text: str
    depths: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True)
class OutputChunk:
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


class Reply(NamedTuple):
    """To a question."""

    value: Any


class EngineFailure(Exception):
    """An engine has ended, or failed at something, and no caller is to blame.

    Attributes:
        kind: How, in words that say nothing of the inside. The message and its notes do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Failure:
    """An exception at the other end, as it can be sent.

    Attributes:
        kind: Name of its class.
        message: Its text.
        traceback: As Python prints it.
        expected: Its class, if it is one of ours.
    """

    kind: str
    message: str
    traceback: str
    expected: type[RecursifyError] | None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """``error``, to be sent."""
        expected = type(error) if isinstance(error, RecursifyError) else None
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)), expected)

    @property
    def exception(self) -> Exception:
        """The error again, with a note of where it was: of its own class if it is one of ours, else another."""
        if self.expected is None:
            error: Exception = EngineFailure(self.kind, f"{self.kind}: {self.message}")
        else:
            error = self.expected(self.message)
        error.add_note(f"In the engine:\n{self.traceback}")
        return error


class Stopped(NamedTuple):
    """The engine has failed, or was never made: the last that is heard of it.

    Attributes:
        failure: Why.
        snapshot: Its last counts, if there was one.
    """

    failure: Failure
    snapshot: EngineSnapshot | None


def pack(message: Any) -> bytes:
    """``message`` as a frame."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class Frames:
    """Puts frames together from what comes of them."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are whole with ``data``."""
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield pickle.loads(body)


class ConnectionClosed(Exception):
    """Nobody is at the other end."""


class Connection:
    """The engine's end of a link. It waits to write, since the other end always reads.

    Args:
        end: A connected socket, which is the channel's from now on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._frames = end, Frames()
        end.setblocking(True)
        self._selector = selectors.DefaultSelector()
        self._selector.register(end, selectors.EVENT_READ)

    def receive(self, seconds: float | None) -> list[Any]:
        """The messages that have come; so long, or with None for ever, at least a part of one is waited for.

        Raises:
            ConnectionClosed: There will be no more.
        """
        messages: list[Any] = []
        while self._selector.select(seconds):
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as error:
                raise ConnectionClosed from error
            if not data:
                raise ConnectionClosed
            messages += self._frames.feed(data)
            seconds = 0.0
        return messages

    def send(self, message: Any) -> None:
        """Raises:
        ConnectionClosed: Nobody takes it.
        """
        frame = pack(message)
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise ConnectionClosed from error

    def close(self) -> None:
        """The other end will see it."""
        self._selector.close()
        self._socket.close()
