"""Request middleware: API key, body size limit, read timeout."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .settings import ServerSettings

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Paths that need no API key: the health check, the schema, and the page, which asks for the key."""

DISCARDED_BYTES = 32 * 2**20
"""Number of bytes of an oversized body that are read and discarded: a client that is still writing when the connection
closes does not see the error."""

CLOSE = {"connection": "close"}
"""Headers of errors before the body is read: its rest could not be told from the next request."""


class RequestGuardMiddleware:
    """Checks the API key, and reads the entire body within a size limit and a timeout.

    Args:
        app: Application behind the middleware.
        settings: Settings of the server.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings
        self._digest = None if settings.api_key is None else _digest(settings.api_key.encode())

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
        is_delivered = False

        async def receive_body() -> Message:
            nonlocal is_delivered
            if is_delivered or body is None:
                return await receive()
            is_delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send)

    def _check_key(self, scope: Scope) -> None:
        """Raise an ApiError without the right API key."""
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = sent.partition(b" ")
        if kind.lower() != b"bearer" or not key:
            raise _unauthorized("No API key was sent. Send it as: Authorization: Bearer KEY")
        # Digests have the same length, so that the time of the comparison does not depend on the key's.
        if not hmac.compare_digest(_digest(key.strip()), self._digest):
            raise _unauthorized("The API key is not valid for this server. Check it.")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the body; None if the client has disconnected.

        Raises:
            ApiError: The body is too large, or arrives too slowly.
        """
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


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
