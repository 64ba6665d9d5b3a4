"""Errors as OpenAI's clients expect them: a status, and a body that says what went wrong and nothing of the inside."""

from __future__ import annotations

import itertools
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recursify.errors import EngineError, SettingsError

from .access_log import log_event, request_id_of

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> OpenAI's name of the kind; others are ``invalid_request_error`` below 500, ``server_error`` from there."""

TYPES = ("str", "int", "float", "bool")


class ApiError(Exception):
    """What a caller is told.

    Args:
        status: Of HTTP.
        message: What happened, and what to do.
        param: The field of the request that is to blame.
        code: For programs.
        headers: Of the answer.
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
        """What is sent."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_encoder = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def json_bytes(data: Any) -> bytes:
    """``data`` as JSON; in ASCII, so that half a surrogate pair in it is no error of ours."""
    return _encoder.encode(data).encode()


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``data`` as an answer."""
    return Response(json_bytes(data), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """``error`` as an answer."""
    return json_response(error.body, error.status, error.headers)


def unexpected(request_id: str) -> ApiError:
    """What a caller is told of a bug of ours: where to look, no more."""
    return ApiError(500, f"Something went wrong inside the server; its log says what, at request {request_id}.")


def refused(error: EngineError | SettingsError) -> ApiError:
    """What the engine would not take."""
    too_long = "together more than" in str(error)
    return ApiError(400, str(error), code="context_length_exceeded" if too_long else "invalid_value")


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request; what was sent is not repeated."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON (at character {place[0] if place else 0}).", code="invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    if not place and first["type"] == "value_error":
        return ApiError(400, f"{message}.", code="invalid_value")
    if not place:
        return ApiError(400, "The body must be a JSON object, sent as application/json.", code="invalid_json")
    # Behind a field that takes several types, pydantic names the type that it tried.
    known = list(itertools.takewhile(lambda part: (part.isidentifier() and part not in TYPES) or part.isdigit(), place))
    if first["type"] == "extra_forbidden":
        message = "This field is not known here. Leave it out, or see /openapi.json for those that are"
    elif len(known) < len(place) and first["type"].endswith("_type"):
        message = "The value has none of the types that this field takes; see /openapi.json"
    name, param = ".".join(known or place[:1])[:100], place[0][:100]
    return ApiError(400, f"{name}: {message}.", param=param, code="invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Have ``app`` answer with these."""

    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid(error))

    @app.exception_handler(EngineError)
    @app.exception_handler(SettingsError)
    async def of_refusal(request: Request, error: EngineError | SettingsError) -> Response:
        return error_response(refused(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        said = {404: "There is nothing at this address.", 405: "This address does not take that method."}
        message = said.get(error.status_code, "The body cannot be read: it must be JSON in UTF-8.")
        return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


class Failsafe:
    """Answers for what nobody has caught, and logs it: a bug of ours, of which a caller learns the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        except Exception as error:
            if scope["type"] != "http":
                raise
            request_id = request_id_of(scope)
            log_event("error", "a request failed", id=request_id, exception=error)
            if not begun:
                await error_response(unexpected(request_id))(scope, receive, send)
