"""Request middleware: request ids, access log, uncaught errors, API key, body size limit, read timeout."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from hashlib import sha256
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access_log import log_event, log_fields
from .errors import ApiError, error_response, internal_error
from .settings import ServerSettings

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""Pattern of values of ``X-Request-Id`` that are accepted from clients."""

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Paths that need no API key: the health check, the schema, and the page, which asks for the key."""

DISCARDED_BYTES = 32 * 2**20
"""Number of bytes of an oversized body that are read and discarded: a client that is still writing when the connection
closes does not see the error."""

CLOSE = {"connection": "close"}
"""Headers of errors before the body is read: its rest could not be told from the next request."""


class AccessLogMiddleware:
    """Gives every request an id, logs it when it ends, and responds to an uncaught exception."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent_id.decode() if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        fields: dict[str, Any] = {"id": request_id, "method": scope["method"]}
        log_fields.set(fields)
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log_event("error", "a request failed", id=request_id, exception=error)
            if not status:
                await error_response(internal_error(request_id))(scope, receive, send_with_id)
        finally:
            client, seconds = scope.get("client") or ["unknown"], round(time.perf_counter() - started, 4)
            fields |= {"route": getattr(scope.get("route"), "path", None), "client": client[0]}
            log_event("info" if status < 500 else "error", "request", **fields, status=status, seconds=seconds)


class RequestGuardMiddleware:
    """Checks the API key, and reads the entire body within a size limit and a timeout."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings
        self._digest = None if settings.api_key is None else sha256(settings.api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._read_body(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        unread: list[Message] = []
        if body is not None:
            unread.append({"type": "http.request", "body": body, "more_body": False})

        async def receive_body() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_body, send)

    def _check_key(self, scope: Scope) -> None:
        """Raise an ApiError without the right API key."""
        if self._digest is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = sent.partition(b" ")
        if kind.lower() != b"bearer" or not key:
            raise _unauthorized("No API key was sent. Send it as: Authorization: Bearer KEY")
        # Digests have the same length, so that the time of the comparison does not depend on the key's.
        if not hmac.compare_digest(sha256(key.strip()).digest(), self._digest):
            raise _unauthorized("The API key is not valid for this server. Check it.")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the body, None if the client has disconnected; raise an ApiError if it is too large or too slow."""
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"The body is larger than {limit} bytes. Send a smaller one.", headers=CLOSE)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limit + DISCARDED_BYTES:
            raise too_large
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    has_ended = not message.get("more_body", False)
                    if size <= limit:
                        body += message.get("body", b"")
                    elif has_ended or size > limit + DISCARDED_BYTES:
                        raise too_large
                    if has_ended:
                        return bytes(body)
        except TimeoutError:
            reason = f"The body did not arrive within {self.settings.body_timeout:g} seconds. Send it faster."
            raise ApiError(408, reason, headers=CLOSE) from None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
