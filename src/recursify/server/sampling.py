"""Sampling parameters of the engine from a request's fields, within the limits of the server."""

from __future__ import annotations

from typing import Any

from recursify.engine import SamplingParams
from recursify.errors import SettingsError
from recursify.modeling import EXIT_POLICIES, KV_MODES, ExitSettings

from .errors import ApiError
from .schema import ChatRequest, ExitRequest, GenerationRequest
from .settings import ServerSettings

COMPLETION_TOKENS = 16
"""Maximum number of new tokens of a completion that does not set it, OpenAI's default. A chat has no such default."""

POLICIES = tuple(name for name, policy in EXIT_POLICIES.items() if not policy.simulated)
"""Exit policies that are served; a simulated one runs all recursions and saves no time."""


def check_exit_policy(name: str | None) -> None:
    """Check that exit policy ``name`` is served.

    Raises:
        SettingsError: An unknown policy, or a simulated one.
    """
    if name is None or name in POLICIES:
        return
    if name in EXIT_POLICIES:
        raise SettingsError(
            f"Exit policy '{name}' is a simulation, which runs all recursions to find the earliest correct depth, and "
            f"is not served. Use one of: {', '.join(POLICIES)}."
        )
    raise SettingsError(f"Unknown exit policy. Use one of: {', '.join(POLICIES)}.")


class SamplingParamsBuilder:
    """Builds sampling parameters for one engine.

    Args:
        settings: Settings of the server.
        config: Configuration of the model.
        kv: Source of the keys and values of skipped depths in the engine.
        max_model_len: Maximum number of tokens in a request, prompt and completion together.
    """

    def __init__(self, settings: ServerSettings, config: Any, kv: str, max_model_len: int) -> None:
        self.settings, self.config, self.kv, self.max_model_len = settings, config, kv, max_model_len
        self.default_exit = ExitRequest(
            policy=settings.exit_policy,
            threshold=settings.threshold,
            min_depth=settings.min_depth,
            max_depth=settings.max_depth,
        )

    def build(self, request: GenerationRequest, prompt_length: int, logprobs: int | None) -> list[SamplingParams]:
        """Build the parameters of each completion of a prompt; they differ in their seeds.

        Raises:
            ApiError: A value is above the server's limit.
            SettingsError: Invalid exit settings.
        """
        self._check_limits(request)
        exit_parameters = self.exit_parameters(request.exit if request.has_exit else self.default_exit)
        return [
            SamplingParams(
                max_tokens=self._max_tokens(request, prompt_length),
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=request.top_k or 0,
                seed=None if request.seed is None else _seed(request.seed, index),
                stop=request.stops,
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=bool(request.ignore_eos),
                logprobs=logprobs,
                **exit_parameters,
            )
            for index in range(request.n or 1)
        ]

    def exit_parameters(self, request: ExitRequest | None) -> dict[str, Any]:
        """Build the parameters that control early exit.

        Raises:
            SettingsError: An unknown policy, or a value out of range.
        """
        if request is None:
            return {}
        check_exit_policy(request.policy)
        try:
            settings = ExitSettings.from_options(
                request.policy,
                threshold=request.threshold,
                min_depth=request.min_depth,
                # A routed model's kv is not an exit's; from_options refuses exits of such a model.
                kv=self.kv if self.kv in KV_MODES else None,
                config=self.config,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error
        return {"exit": settings, "max_depth": request.max_depth}

    def _check_limits(self, request: GenerationRequest) -> None:
        limits = self.settings
        if (request.n or 1) > limits.max_choices:
            raise _limit_exceeded("n", f"At most {limits.max_choices} choices are allowed, got {request.n}.")
        if len(request.stops) > limits.max_stops:
            message = f"At most {limits.max_stops} stop strings are allowed, got {len(request.stops)}."
            raise _limit_exceeded("stop", message)
        if any(len(stop) > limits.max_stop_characters for stop in request.stops):
            raise _limit_exceeded("stop", f"At most {limits.max_stop_characters} characters per string are allowed.")

    def _max_tokens(self, request: GenerationRequest, prompt_length: int) -> int:
        limit = self.settings.max_tokens
        param, value = "max_tokens", getattr(request, "max_tokens", None)
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            param, value = "max_completion_tokens", request.max_completion_tokens
        if value is None:
            room = max(self.max_model_len - prompt_length, 1)
            return min(limit, room, room if isinstance(request, ChatRequest) else COMPLETION_TOKENS)
        if value > limit:
            raise _limit_exceeded(param, f"At most {limit} new tokens are allowed, got {value}.")
        return value


def _limit_exceeded(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="limit_exceeded")


def _seed(seed: int, index: int) -> int:
    """Return the seed of a completion; the first one has the request's own."""
    return seed if index == 0 else (seed + index) % 2**63
