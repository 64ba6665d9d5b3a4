"""Wire protocol between an engine process and its client: length-prefixed pickles over a socket pair.

Both ends belong to this program, and one starts the other, so that no foreign data is unpickled.
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
"""Size of the length that precedes each message."""
READ_BYTES = 2**16


@dataclass(frozen=True)
class EngineInfo:
    """Properties of an engine, sent once it takes requests.

    Attributes:
        config: Configuration of the model.
        tokenizer: Tokenizer of the model, or None.
        kv: Source of the keys and values of skipped depths, one of :data:`~recursify.engine.KV_MODES`.
        max_model_len: Maximum number of tokens in a request, prompt and completion together.
        max_num_seqs: Maximum number of requests that run at once.
        num_pages: Number of KV pages in the first pool.
        num_recursions: Number of recursions of the model.
    """

    config: Any
    tokenizer: Any
    kv: str
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    num_recursions: int


class Accepted(NamedTuple):
    """Confirmation that the engine has taken a request."""


class OutputDelta(NamedTuple):
    """New output of a request, as it is sent.

    Attributes:
        token_ids: New tokens.
        start: Number of characters of the text so far that remain; fewer than all only if decoding the finished text
            at once differs from decoding it piece by piece.
        text: Text after those characters.
        depths: Exit depth of each new token.
        logprobs: Log-probabilities per new token, if requested.
        finish_reason: Reason for the end of the request, in its last delta.
        cached_tokens: Number of prompt tokens whose keys and values were cached.
        preemptions: Number of times the request was preempted.
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
    """New output of a request since the last chunk, as a listener gets it.

    Attributes:
        request_id: Number of the request.
        token_ids: New tokens; empty if the chunk only ends the request.
        text: New text.
        depths: Exit depth of each new token.
        logprobs: Mapping from token ids to log-probabilities per new token, if requested.
        finish_reason: Reason for the end of the request, in its last chunk.
        output: Entire output so far; read-only.
    """

    request_id: int
    token_ids: list[int]
    text: str
    depths: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    output: RequestOutput


class Reply(NamedTuple):
    """Result of a call."""

    value: Any


class EngineFailure(Exception):
    """The engine has failed, through no fault of the caller.

    Attributes:
        kind: Description of the failure without internal details; the message and its notes contain those.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Failure:
    """An exception in the engine process, as it is sent.

    Attributes:
        kind: Name of its class.
        message: Text of the exception.
        traceback: Traceback as Python prints it.
        expected: Class of the exception, if it is a RecursifyError.
    """

    kind: str
    message: str
    traceback: str
    expected: type[RecursifyError] | None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe ``error``."""
        expected = type(error) if isinstance(error, RecursifyError) else None
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)), expected)

    @property
    def exception(self) -> Exception:
        """A RecursifyError of the same class, or else an EngineFailure, with the traceback as a note."""
        if self.expected is None:
            error: Exception = EngineFailure(self.kind, f"{self.kind}: {self.message}")
        else:
            error = self.expected(self.message)
        error.add_note(f"In the engine:\n{self.traceback}")
        return error


class Stopped(NamedTuple):
    """The last message of an engine that failed or could not be made.

    Attributes:
        failure: Reason.
        snapshot: Last counts of the engine, if it was made.
    """

    failure: Failure
    snapshot: EngineSnapshot | None


def pack(message: Any) -> bytes:
    """Serialize ``message``, preceded by its length."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def unpack(buffer: bytearray) -> Iterator[Any]:
    """Take every complete message out of ``buffer``; an incomplete one stays there."""
    while len(buffer) >= LENGTH_BYTES:
        end = LENGTH_BYTES + int.from_bytes(buffer[:LENGTH_BYTES], "big")
        if len(buffer) < end:
            return
        body = bytes(buffer[LENGTH_BYTES:end])
        del buffer[:end]
        yield pickle.loads(body)


class ConnectionClosed(Exception):
    """The other end of the connection is closed."""


class Connection:
    """The engine's end of the socket pair. Writes block, since the client always reads.

    Args:
        end: Connected socket, which the connection owns from now on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._buffer = end, bytearray()
        end.setblocking(True)
        self._selector = selectors.DefaultSelector()
        self._selector.register(end, selectors.EVENT_READ)

    def receive(self, timeout: float | None) -> list[Any]:
        """Read the messages that have arrived.

        Args:
            timeout: Seconds to wait for data, which may be a part of a message; None waits without a limit.

        Raises:
            ConnectionClosed: The client has closed the connection.
        """
        messages: list[Any] = []
        while self._selector.select(timeout):
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as error:
                raise ConnectionClosed from error
            if not data:
                raise ConnectionClosed
            self._buffer += data
            messages += unpack(self._buffer)
            timeout = 0.0
        return messages

    def send(self, message: Any) -> None:
        """Write a message.

        Raises:
            ConnectionClosed: The client has closed the connection.
        """
        data = pack(message)
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionClosed from error

    def close(self) -> None:
        """Close the socket, which the client notices."""
        self._selector.close()
        self._socket.close()
