"""Wire protocol between an engine process and its client: length-prefixed pickles over a socket pair.

Both ends belong to this program, and one starts the other, so that no foreign data is unpickled.
"""

from __future__ import annotations

import pickle
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from recursify.checkpoint.generation_defaults import GenerationDefaults
from recursify.engine.engine import Engine
from recursify.engine.request import FinishReason, RequestOutput
from recursify.errors import RecursifyError

LENGTH_BYTES, READ_BYTES = 8, 2**16
"""Size of the length that precedes each message, and maximum size of one read."""


class EngineInfo(NamedTuple):
    """Properties of an engine, sent once it takes requests: of its model, and of its resolved settings."""

    config: Any
    tokenizer: Any
    defaults: GenerationDefaults
    kv: str
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    num_recursions: int

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Read the properties of ``engine``."""
        return cls(
            config=engine.decoder.config,
            tokenizer=engine.tokenizer,
            defaults=engine.defaults,
            kv=engine.kv,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.scheduler.max_num_seqs,
            num_pages=engine.kv_cache.pools[0].num_pages,
            num_recursions=engine.decoder.num_depths,
        )


class Accepted(NamedTuple):
    """Confirmation that the engine has taken a request."""


class OutputDelta(NamedTuple):
    """New output of a request, as it is sent.

    Attributes:
        start: Number of characters of the text so far that remain; fewer than all only if decoding the finished text
            at once differs from decoding it piece by piece.
        new: Output with the new tokens only, and the text after those characters.
    """

    start: int
    new: RequestOutput


@dataclass(frozen=True)
class OutputChunk:
    """New output of a request since the last chunk, as a listener gets it.

    Attributes:
        token_ids: New tokens; empty if the chunk only ends the request.
        text: New text.
        depths: Exit depth of each new token.
        logprobs: Mapping from token ids to log-probabilities per new token, if requested.
        finish_reason: Reason for the end of the request, in its last chunk.
        output: Entire output so far; read-only.
    """

    token_ids: list[int]
    text: str
    depths: list[int]
    logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason | None
    output: RequestOutput


class EngineFailure(Exception):
    """The engine has failed, through no fault of the caller.

    Attributes:
        kind: Description of the failure without internal details; the message and its notes contain those.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[1]


def portable_error(error: BaseException) -> Exception:
    """Copy an error for the client: a RecursifyError, or else an EngineFailure, with the traceback as a note."""
    name, message = type(error).__name__, str(error)
    copy = type(error)(message) if isinstance(error, RecursifyError) else EngineFailure(name, f"{name}: {message}")
    copy.add_note(f"In the engine:\n{''.join(traceback.format_exception(error))}")
    return copy


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
    """The client has closed the connection."""


class Connection:
    """The engine's end of the socket pair, which it owns. Writes block, since the client always reads."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._buffer = end, bytearray()

    def receive(self, timeout: float | None) -> list[Any]:
        """Read the messages that have arrived, or raise ConnectionClosed.

        Args:
            timeout: Seconds to wait for data, which may be a part of a message; None waits without a limit.
        """
        messages: list[Any] = []
        self._socket.settimeout(timeout)
        try:
            while data := self._socket.recv(READ_BYTES):
                self._buffer += data
                messages += unpack(self._buffer)
                self._socket.settimeout(0.0)
        except (BlockingIOError, TimeoutError):
            return messages
        except OSError as error:
            raise ConnectionClosed from error
        raise ConnectionClosed

    def send(self, message: Any) -> None:
        """Write a message, or raise ConnectionClosed."""
        data = pack(message)
        self._socket.settimeout(None)
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionClosed from error

    def close(self) -> None:
        """Close the socket, which the client notices."""
        self._socket.close()
