"""Sampling parameters of the engine from a request's fields, within the limits of the server."""

from __future__ import annotations

from typing import Any

from recursify.engine import SamplingParams
from recursify.errors import SettingsError
from recursify.modeling import EXIT_POLICIES, KV_MODES, ExitSettings

from .errors import check_limit
from .schema import ChatRequest, ExitRequest, GenerationRequest
from .settings import ServerSettings

COMPLETION_TOKENS = 16
"""Maximum number of new tokens of a completion that does not set it, OpenAI's default. A chat has no such default."""

POLICIES = tuple(name for name, policy in EXIT_POLICIES.items() if not policy.simulated)
"""Exit policies that are served; a simulated one runs all recursions and saves no time."""


def check_exit_policy(name: str | None) -> None:
    """Raise a SettingsError for an unknown exit policy, or a simulated one."""
    if name is None or name in POLICIES:
        return
    reason = "Unknown exit policy."
    if name in EXIT_POLICIES:
        what = "a simulation, which runs all recursions to find the earliest correct depth"
        reason = f"Exit policy '{name}' is {what}, and is not served."
    raise SettingsError(f"{reason} Use one of: {', '.join(POLICIES)}.")


class SamplingParamsBuilder:
    """Builds sampling parameters for an engine with this ``config`` of the model, ``kv`` and ``max_model_len``."""

    def __init__(self, settings: ServerSettings, config: Any, kv: str, max_model_len: int) -> None:
        self.settings, self.config, self.kv, self.max_model_len = settings, config, kv, max_model_len
        options = {name: getattr(settings, name) for name in ("threshold", "min_depth", "max_depth")}
        self.default_exit = ExitRequest(policy=settings.exit_policy, **options)

    def build(self, request: GenerationRequest, prompt_length: int, logprobs: int | None) -> list[SamplingParams]:
        """Build the parameters of each completion of a prompt; they differ in their seeds.

        Raises:
            ApiError: A value is above the server's limit.
            SettingsError: Invalid exit settings.
        """
        settings, longest_stop = self.settings, max(map(len, request.stops), default=0)
        check_limit("n", request.n or 1, settings.max_choices, "choices")
        check_limit("stop", len(request.stops), settings.max_stops, "stop strings")
        check_limit("stop", longest_stop, settings.max_stop_characters, "characters per string")
        has_exit = "exit" in request.model_fields_set  # with null, it turns the default exit off
        exit_parameters = self.exit_parameters(request.exit if has_exit else self.default_exit)
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
        """Build the parameters that control early exit; raise a SettingsError for invalid ones."""
        if request is None:
            return {}
        check_exit_policy(request.policy)
        # A routed model's kv is not an exit's; from_options refuses exits of such a model.
        kv = self.kv if self.kv in KV_MODES else None
        options = {"threshold": request.threshold, "min_depth": request.min_depth, "kv": kv}
        try:
            settings = ExitSettings.from_options(request.policy, config=self.config, **options)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        return {"exit": settings, "max_depth": request.max_depth}

    def _max_tokens(self, request: GenerationRequest, prompt_length: int) -> int:
        limit = self.settings.max_tokens
        param, value = "max_tokens", request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            param, value = "max_completion_tokens", request.max_completion_tokens
        if value is None:
            room = max(self.max_model_len - prompt_length, 1)
            return min(limit, room, room if isinstance(request, ChatRequest) else COMPLETION_TOKENS)
        check_limit(param, value, limit, "new tokens")
        return value


def _seed(seed: int, index: int) -> int:
    """Return the seed of a completion; the first one has the request's own."""
    return seed if index == 0 else (seed + index) % 2**63
