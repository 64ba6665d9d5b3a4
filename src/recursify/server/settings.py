"""What a server is told when it is made: names, the key, and what one caller may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recursify.errors import SettingsError
from recursify.modeling import ExitSettings, make_policy
from recursify.modeling.recursive_policies import EXIT_POLICIES, KV_MODES

POLICIES = tuple(name for name, policy in EXIT_POLICIES.items() if not policy.simulated)
"""Those that a request can name: a simulation runs all depths, and saves a server nothing."""


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """How tokens leave early, as a request says it.

    Attributes:
        policy: Of :data:`POLICIES`; None for none.
        threshold: One, or one per exit; None takes the model's own.
        min_depth: The first depth after which tokens may leave.
        max_depth: The last recursion that a new token runs; None for all.
    """

    policy: str | None = None
    threshold: float | tuple[float, ...] | None = None
    min_depth: int = 0
    max_depth: int | None = None

    def __post_init__(self) -> None:
        """Raises:
        SettingsError: A policy that is not for servers, or a threshold of none.
        """
        if self.policy == "oracle":
            raise SettingsError(
                f"Policy 'oracle' is a simulation: it runs all recursions to know where it could have stopped, and is "
                f"not served. Use one of: {', '.join(POLICIES)}."
            )
        if self.policy is not None and self.policy not in POLICIES:
            raise SettingsError(f"Unknown exit policy. Use one of: {', '.join(POLICIES)}.")
        if self.policy is None and (self.threshold is not None or self.min_depth):
            raise SettingsError("threshold and min_depth are for an exit policy, and none is named. Name a policy.")

    def settings(self, config: Any, kv: str) -> ExitSettings | None:
        """What the engine takes, for a model of ``config`` whose keys and values are made as ``kv`` says.

        Raises:
            SettingsError: A value outside its range.
        """
        if self.policy is None:
            return None
        try:
            policy = make_policy(self.policy, self.threshold, config)
            # A routed model has a kv of its own, and the engine says that such a model has no exits.
            return ExitSettings(policy, kv=kv if kv in KV_MODES else "deferred", min_depth=self.min_depth)
        except ValueError as error:
            raise SettingsError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server offers, and its limits.

    Attributes:
        model_name: Under which the model is offered.
        api_key: What callers must send; None lets everyone in.
        default_exit: For requests that do not say how tokens leave.
        max_body_bytes: Of a request.
        max_prompt_tokens: Of one prompt; None: what the engine takes.
        max_tokens: New tokens that one answer may have.
        max_prompts: In one request.
        max_choices: Answers to one prompt (``n``).
        max_stops: Stop strings of a request.
        max_stop_characters: Of one of them.
        max_queue: Answers that may wait beside those that run.
        request_seconds: From a request's arrival to its end.
        body_seconds: In which its body must have come.
        write_seconds: In which a reader must take what it is sent.
        shutdown_seconds: In which answers are finished when the server ends; what is left then is told so.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    default_exit: ExitChoice | None = None
    max_body_bytes: int = 2 * 2**20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    max_prompts: int = 128
    max_choices: int = 16
    max_stops: int = 16
    max_stop_characters: int = 128
    max_queue: int = 256
    request_seconds: float = 600.0
    body_seconds: float = 20.0
    write_seconds: float = 60.0
    shutdown_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Raises:
        SettingsError: A limit that lets nothing through, or a key that cannot be sent.
        """
        for name in vars(self):
            value, lowest = getattr(self, name), 0 if name in ("max_queue", "shutdown_seconds") else 1
            if name.startswith("max_") and value is not None and value < lowest:
                raise SettingsError(f"{name} must be at least {lowest}, got {value}.")
            if name.endswith("_seconds") and (value < 0 or (lowest and value == 0)):
                raise SettingsError(f"{name} must be more than 0, got {value:g}.")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii() or " " in self.api_key):
            raise SettingsError(
                "The API key must have at least 8 characters, ASCII and without spaces. Choose another."
            )
