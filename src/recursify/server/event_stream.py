"""Server-sent events to a reader who may be slow, or gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import json_bytes
from .request_log import note

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""How OpenAI's streams end."""


class ReaderGone(Exception):
    """Nobody is there to be answered."""


def event(data: Any) -> bytes:
    """``data`` as an event."""
    return b"data: " + json_bytes(data) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What comes of ``work``, which is cancelled when the caller goes.

    Raises:
        ReaderGone: The caller has gone.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ReaderGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what ``events`` yields, and closes it whatever happens.

    Args:
        events: Bytes of events.
        write_seconds: In which a reader must take what is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], write_seconds: float) -> None:
        self.events, self.write_seconds = events, write_seconds
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except TimeoutError:
            note(reader="too slow")
        except (ReaderGone, OSError):
            note(reader="gone")

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                async with asyncio.timeout(self.write_seconds):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
