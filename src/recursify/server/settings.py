"""Settings of a server: the model's name, the API key, the default early exit and the limits of requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from recursify.errors import SettingsError

ZERO = ("max_queue", "min_depth", "max_depth", "shutdown_timeout")
"""Fields that may be 0."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    Raises:
        SettingsError: A limit is out of range, or the API key cannot be sent in a header.
    """

    model_name: str | None = None
    """Name of the model for clients; by default the name of its folder."""

    api_key: str | None = field(default=None, repr=False)
    """API key that clients must send; by default none is required."""

    exit_policy: str | None = None
    """Exit policy for requests that do not name one; by default every token runs all recursions."""

    threshold: float | None = None
    """Confidence above which tokens exit; by default the calibrated threshold, else the policy's."""

    min_depth: int = 0
    """First depth after which tokens may exit."""

    max_depth: int | None = None
    """Last depth that new tokens run; by default all depths."""

    max_body_bytes: int = 2 * 2**20
    """Maximum size of a request body."""

    max_prompt_tokens: int | None = None
    """Maximum number of tokens in a prompt; by default what the engine takes."""

    max_tokens: int = 4096
    """Maximum number of new tokens per completion."""

    max_prompts: int = 128
    """Maximum number of prompts in a request."""

    max_choices: int = 16
    """Maximum number of completions per prompt (``n``)."""

    max_stops: int = 16
    """Maximum number of stop strings in a request."""

    max_stop_characters: int = 128
    """Maximum length of a stop string."""

    max_queue: int = 256
    """Maximum number of completions that wait for the engine; further ones get status 429."""

    request_timeout: float = 600.0
    """Seconds from the arrival of a request to its end."""

    body_timeout: float = 20.0
    """Seconds in which the body of a request must arrive."""

    write_timeout: float = 60.0
    """Seconds in which a client must read an event of a stream."""

    shutdown_timeout: float = 30.0
    """Seconds in which running requests may finish when the server shuts down."""

    def __post_init__(self) -> None:
        for name in vars(self):
            value, lowest = getattr(self, name), 0 if name in ZERO else 1
            if name.startswith(("max_", "min_")) and value is not None and value < lowest:
                raise SettingsError(f"{name} must be at least {lowest}, got {value}.")
            if name.endswith("_timeout") and (value < 0 or (lowest and value == 0)):
                raise SettingsError(f"{name} must be more than 0, got {value:g}.")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii() or " " in self.api_key):
            raise SettingsError("The API key must have at least 8 ASCII characters and no spaces. Choose another key.")
