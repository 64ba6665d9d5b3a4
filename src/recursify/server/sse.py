"""Server-sent events to a reader who may be slow, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .access_log import note
from .errors import json_bytes

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""How OpenAI's streams end."""

LOOK_SECONDS = 0.25
"""How often a reader is looked after: a limit to every single event would cost more than the event."""


class ClientDisconnected(Exception):
    """Nobody is there to be answered."""


def event(data: Any) -> bytes:
    """``data`` as an event."""
    return b"data: " + json_bytes(data) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], stalled: Callable[[], bool] | None = None) -> T:
    """What comes of ``work``, which is cancelled when the caller goes.

    Args:
        receive: The request's.
        work: What is done for the caller.
        stalled: Asked once in a while, whether the caller is to be left.

    Raises:
        ClientDisconnected: The caller has gone.
        TimeoutError: ``work`` has stalled.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        done: set[asyncio.Future[Any]] = set()
        while not done:
            limit = None if stalled is None else LOOK_SECONDS
            done, _ = await asyncio.wait({working, leaving}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not done and stalled is not None and stalled():
                raise TimeoutError
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Sends what ``events`` yields, and closes it whatever happens.

    Args:
        first: The first event.
        events: The others.
        write_seconds: In which a reader must take what is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], write_seconds: float) -> None:
        self.first, self.events, self.write_seconds = first, events, write_seconds
        self.status_code, self.background = 200, None
        self._sending_since: float | None = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send), self._has_stalled)
        except TimeoutError:
            note(reader="too slow")
        except (ClientDisconnected, OSError):
            note(reader="gone")

    def _has_stalled(self) -> bool:
        since = self._sending_since
        return since is not None and time.monotonic() - since > self.write_seconds

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.first, "more_body": True})
            async for data in events:
                self._sending_since = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending_since = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
