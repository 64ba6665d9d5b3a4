"""Access log: one JSON object per line, and the id that identifies a request in it.

The log contains sizes, times and outcomes, and never a prompt, a completion, a header or an unknown path.
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

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""Pattern of values of ``X-Request-Id`` that are accepted from clients."""

_fields: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("fields of the current request's log entry")


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line)


def log_event(level: str, event: str, *, exception: BaseException | None = None, **fields: Any) -> None:
    """Log ``event`` with ``fields``."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logger.log(number, event, extra={"fields": fields}, exc_info=exception)


def add_log_fields(**fields: Any) -> None:
    """Add fields to the log entry of the current request."""
    _fields.get({}).update(fields)


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """Return the id of a request."""
    return scope.get("recursify_request_id", "unknown")


class AccessLogMiddleware:
    """Gives every request an id, and logs the request when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent_id.decode() if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope["recursify_request_id"] = request_id
        fields: dict[str, Any] = {}
        _fields.set(fields)
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
                **fields,
            )
