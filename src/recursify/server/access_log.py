"""Logs of one JSON object per line, and the id by which a request is found in them.

What callers write and what they are told is never logged, nor are headers: only sizes, times and outcomes.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("recursify.server")

FIT = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""Ids that are taken over from a caller's ``X-Request-Id``."""

_current: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("facts of the request")


class JsonLines(logging.Formatter):
    """A record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line)


def log_event(level: str, event: str, *, exception: BaseException | None = None, **facts: Any) -> None:
    """Log ``event`` with its facts."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logger.log(number, event, extra={"facts": facts}, exc_info=exception)


def note(**facts: Any) -> None:
    """Add to what will be logged of the request that is being answered."""
    _current.get({}).update(facts)


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The request's id."""
    return scope.get("recursify_request_id", "unknown")


class RequestLog:
    """Gives every request an id, and logs it when it has been answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if FIT.fullmatch(given) else uuid.uuid4().hex
        scope["recursify_request_id"] = request_id
        facts: dict[str, Any] = {}
        _current.set(facts)
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            log_event(
                "info" if status < 500 else "error",
                "request",
                id=request_id,
                method=scope["method"],
                route=getattr(route, "path", None),
                status=status,
                seconds=round(time.perf_counter() - started, 4),
                client=(scope.get("client") or ("unknown",))[0],
                **facts,
            )
