"""Errors in OpenAI's format: a status, and a body that tells what went wrong without internal details."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from recursify.errors import ContextLengthError, EngineError, SettingsError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Mapping from statuses to OpenAI's error types; others are ``invalid_request_error`` below 500, else
``server_error``."""

TYPES = ("str", "int", "float", "bool")


@dataclass(eq=False)
class ApiError(Exception):
    """Error that is sent to the client.

    Attributes:
        status: HTTP status.
        message: Description of the error, and what to do.
        param: Field of the request that caused it.
        code: Name of the error for programs.
        headers: Headers of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] | None = None

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


def api_error(error: Exception) -> ApiError:
    """Convert an error about a request, of one of the classes :data:`REQUEST_ERRORS`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    if isinstance(error, HTTPException):
        messages = {404: "Not found. See /openapi.json for the paths.", 405: "Method not allowed for this path."}
        message = messages.get(error.status_code, "The body cannot be read: it must be JSON in UTF-8.")
        return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else "invalid_value"
    return ApiError(400, str(error), code=code)


def validation_error(error: RequestValidationError) -> ApiError:
    """Convert the first validation error of a request; the request's content is not repeated."""
    errors = error.errors()
    # Of the types of a field, the one that has a wrong kind of part says more than the others: an image in a message.
    first = next((entry for entry in errors if entry["type"] == "literal_error"), errors[0])
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
    choose = filter if first["type"] == "literal_error" else itertools.takewhile
    fields = list(choose(lambda part: (part.isidentifier() and part not in TYPES) or part.isdigit(), location))
    if first["type"] == "extra_forbidden":
        message = "Unknown field. Remove it, or see /openapi.json for the known ones"
    elif len(fields) < len(location) and first["type"].endswith("_type"):
        message = "The value has none of the types that this field accepts; see /openapi.json"
    name, param = ".".join(fields or location[:1])[:100], location[0][:100]
    return ApiError(400, f"{name}: {message}.", param=param, code="invalid_value")


def check_limit(param: str, value: int, limit: int, what: str) -> None:
    """Raise an ApiError if a field of a request asks for more than ``limit`` of something."""
    if value > limit:
        message = f"{param}: At most {limit} {what} are allowed, got {value}."
        raise ApiError(400, message, param=param, code="limit_exceeded")


REQUEST_ERRORS = (ApiError, RequestValidationError, HTTPException, EngineError, SettingsError)


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers that convert :data:`REQUEST_ERRORS` to responses."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(api_error(error))

    for kind in REQUEST_ERRORS:
        app.add_exception_handler(kind, handle)
