"""What stands before every route: the key, and the size and time of a body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .settings import ServerSettings

OPEN = ("/", "/health", "/openapi.json")
"""What is shown without a key: whether the server is well, how to ask it, and the page, which asks for the key."""


class Guard:
    """Lets requests through that have the key and a body of bearable size, which it reads whole.

    Args:
        app: What it guards.
        settings: Key and limits.
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
            body = await self._read(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        given = False

        async def receive_read() -> Message:
            nonlocal given
            if given or body is None:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_read, send)

    def _check_key(self, scope: Scope) -> None:
        """Raises:
        ApiError: No key, or another one.
        """
        if self._digest is None or scope["path"] in OPEN:
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = sent.partition(b" ")
        if kind.lower() != b"bearer" or not key:
            raise _unauthorized("No API key was sent. Send it as: Authorization: Bearer KEY")
        # Digests have one length, so that the time of the comparison says nothing of the key's.
        if not hmac.compare_digest(_digest(key.strip()), self._digest):
            raise _unauthorized("The API key is not this server's. Check it.")

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the caller has gone.

        Raises:
            ApiError: It is too large, or comes too slowly.
        """
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"The body is larger than {limit} bytes. Send a smaller one.", headers=CLOSE)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limit + DISCARDED_BYTES:
            raise too_large
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
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
            seconds = self.settings.body_seconds
            raise ApiError(408, f"The body did not come within {seconds:g} seconds.", headers=CLOSE) from None


DISCARDED_BYTES = 32 * 2**20
"""What is too large is read this far and thrown away: who is still writing when the connection closes does not get to
see why."""

CLOSE = {"connection": "close"}
"""What is left of a body that was not read cannot be told from the next request."""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
