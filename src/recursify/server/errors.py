"""Errors in OpenAI's format: a status, and a body that tells what went wrong without internal details."""

from __future__ import annotations

import itertools
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recursify.errors import ContextLengthError, EngineError, SettingsError

from .access_log import log_event, request_id_of

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Mapping from statuses to OpenAI's error types; others are ``invalid_request_error`` below 500, else
``server_error``."""

TYPES = ("str", "int", "float", "bool")


class ApiError(Exception):
    """Error that is sent to the client.

    Args:
        status: HTTP status.
        message: Description of the error, and what to do.
        param: Field of the request that caused it.
        code: Name of the error for programs.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """Body of the response."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_encoder = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def json_bytes(data: Any) -> bytes:
    """Encode ``data`` as JSON, in ASCII, so that a lone surrogate in it does not fail."""
    return _encoder.encode(data).encode()


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Make a response with ``data`` as JSON."""
    return Response(json_bytes(data), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Make the response for ``error``."""
    return json_response(error.body, error.status, error.headers)


def internal_error(request_id: str) -> ApiError:
    """Make the error for a bug, which names only the request's id in the log."""
    return ApiError(500, f"Internal server error. See the server's log for request {request_id}.")


def engine_refusal(error: EngineError | SettingsError) -> ApiError:
    """Convert an error of the engine about a request."""
    is_too_long = isinstance(error, ContextLengthError)
    return ApiError(400, str(error), code="context_length_exceeded" if is_too_long else "invalid_value")


def validation_error(error: RequestValidationError) -> ApiError:
    """Convert the first validation error of a request; the request's content is not repeated."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        position = location[0] if location else 0
        return ApiError(400, f"The body is not JSON (at character {position}). Correct it.", code="invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    if not location and first["type"] == "value_error":
        return ApiError(400, f"{message}.", code="invalid_value")
    if not location:
        return ApiError(400, "The body must be a JSON object, sent as application/json.", code="invalid_json")
    # For a field of several types, pydantic adds the name of the type it tried to the location.
    fields = list(
        itertools.takewhile(lambda part: (part.isidentifier() and part not in TYPES) or part.isdigit(), location)
    )
    if first["type"] == "extra_forbidden":
        message = "Unknown field. Remove it, or see /openapi.json for the known ones"
    elif len(fields) < len(location) and first["type"].endswith("_type"):
        message = "The value has none of the types that this field accepts; see /openapi.json"
    name, param = ".".join(fields or location[:1])[:100], location[0][:100]
    return ApiError(400, f"{name}: {message}.", param=param, code="invalid_value")


def add_error_handlers(app: FastAPI) -> None:
    """Register the handlers that convert exceptions to error responses."""

    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error))

    @app.exception_handler(EngineError)
    @app.exception_handler(SettingsError)
    async def handle_refusal(request: Request, error: EngineError | SettingsError) -> Response:
        return error_response(engine_refusal(error))

    @app.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> Response:
        messages = {404: "Not found. See /openapi.json for the paths.", 405: "Method not allowed for this path."}
        message = messages.get(error.status_code, "The body cannot be read: it must be JSON in UTF-8.")
        return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


class UncaughtErrorMiddleware:
    """Logs uncaught exceptions, and responds with an internal error that names the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_and_mark(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_mark)
        except Exception as error:
            if scope["type"] != "http":
                raise
            request_id = request_id_of(scope)
            log_event("error", "a request failed", id=request_id, exception=error)
            if not has_started:
                await error_response(internal_error(request_id))(scope, receive, send)
