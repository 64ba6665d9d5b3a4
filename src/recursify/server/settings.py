"""Settings of a server: options of ``recursify serve`` and keywords of ``serve_model``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, ClassVar

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from recursify.settings import ExitOptions, Option, Strings

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")
"""Pattern of origins as browsers send them: in lower case, and without a path or a slash at the end."""


def _check_key(key: str | None) -> str | None:
    if key and (len(key) < 8 or not key.isascii() or " " in key):
        raise ValueError("an API key must have at least 8 ASCII characters and no spaces. Choose another key.")
    return key or None


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"'{origin}' is not an origin, which is a scheme, a host and a port, as in http://localhost:3000, or "
                f"* for all. Correct it."
            )
    return origins


class ServerSettings(ExitOptions):
    """Options of ``recursify serve``; its exit options are the defaults of requests that do not name a policy."""

    panels: ClassVar[Mapping[str, str]] = {
        "model_name": "Server",
        "exit_policy": "Early exit",
        "max_depth": "Early exit",
        "max_tokens": "Limits of requests",
    }

    model_name: Annotated[str | None, Option("--name")] = None
    """Name of the model for clients. Without it, the name of its folder."""
    api_key: Annotated[str | None, AfterValidator(_check_key), Option("--api-key", env="RECURSIFY_API_KEY")] = field(
        default=None, repr=False
    )
    """API key that clients must send. Prefer the environment variable: other users see the options of a process."""

    cors_origin: Annotated[Strings, AfterValidator(_check_origins)] = ()
    """Origin of web pages that may call this server, http://localhost:3000 for example, or * for all."""

    max_depth: NonNegativeInt | None = None
    """Last depth that new tokens run. Without it, the last one."""

    max_tokens: PositiveInt = 4096
    """Maximum number of new tokens per completion."""
    max_queue: NonNegativeInt = 256
    """Maximum number of completions that wait for the engine; further ones get status 429."""
    request_timeout: PositiveFloat = 600.0
    """Seconds from the arrival of a request to its end."""
    shutdown_timeout: NonNegativeFloat = 30.0
    """Seconds in which running requests may finish when the server shuts down."""
    max_body_bytes: PositiveInt = 2 * 2**20
    """Maximum size of a request body."""
    max_prompt_tokens: PositiveInt | None = None
    """Maximum number of tokens in a prompt. Without it, the engine's maximum."""
    max_prompts: PositiveInt = 128
    """Maximum number of prompts in a request."""
    max_choices: PositiveInt = 16
    """Maximum number of completions per prompt (n)."""
    max_stops: PositiveInt = 16
    """Maximum number of stop strings in a request."""
    max_stop_characters: PositiveInt = 128
    """Maximum length of a stop string."""
    body_timeout: PositiveFloat = 20.0
    """Seconds in which the body of a request must arrive."""
    write_timeout: PositiveFloat = 60.0
    """Seconds in which a client must read an event of a stream."""
