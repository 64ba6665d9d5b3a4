"""Server-sent events to clients that may be slow or disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .access_log import add_log_fields
from .errors import json_bytes

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""Last event of OpenAI's streams."""

CHECK_SECONDS = 0.25
"""Interval of checks for a stalled client; a timeout of every send would cost more than the send."""


class ClientDisconnected(Exception):
    """The client has closed the connection."""


def encode_event(data: Any) -> bytes:
    """Encode ``data`` as an event."""
    return b"data: " + json_bytes(data) + b"\n\n"


async def run_until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, T], has_stalled: Callable[[], bool] | None = None
) -> T:
    """Run ``work``, and cancel it when the client disconnects, or ``has_stalled``.

    Raises:
        ClientDisconnected: The client has disconnected.
        TimeoutError: The client has stalled.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        while True:
            timeout = None if has_stalled is None else CHECK_SECONDS
            done, _ = await asyncio.wait({working, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if working in done:
                return working.result()
            if leaving in done:
                raise ClientDisconnected
            if has_stalled is not None and has_stalled():
                raise TimeoutError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Response that sends the ``first`` event and those of a generator, and closes the generator in any case.

    It ends when the client does not read an event within ``write_timeout`` seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], write_timeout: float) -> None:
        self.first, self.events, self.write_timeout = first, events, write_timeout
        self.status_code, self.background = 200, None
        self._sending_since: float | None = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_until_disconnect(receive, self._send(send), self._has_stalled)
        except TimeoutError:
            add_log_fields(reader="too slow")
        except (ClientDisconnected, OSError):
            add_log_fields(reader="gone")

    def _has_stalled(self) -> bool:
        since = self._sending_since
        return since is not None and time.monotonic() - since > self.write_timeout

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.first, "more_body": True})
            async for data in events:
                self._sending_since = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending_since = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
