"""Sampling parameters of the engine from a request's fields, within the limits of the server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recursify.checkpoint.generation_defaults import SAMPLING
from recursify.engine import SamplingParams
from recursify.errors import SettingsError
from recursify.modeling import EXIT_POLICIES, KV_MODES, ExitSettings
from recursify.server.engine_process import EngineInfo

from .errors import check_limit
from .schema import ChatRequest, ExitRequest, GenerationRequest
from .settings import ServerSettings

COMPLETION_TOKENS = 16
"""Maximum number of new tokens of a completion where neither it nor the model sets one, OpenAI's default. A chat has no
such default."""

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
    """Builds sampling parameters for the engine that ``info`` describes.

    What a request leaves out, the model's generation config decides, else OpenAI's defaults: temperature 1, and no
    limit to the tokens to sample from.
    """

    def __init__(self, settings: ServerSettings, info: EngineInfo) -> None:
        self.settings, self.config, self.kv, self.max_model_len = settings, info.config, info.kv, info.max_model_len
        self.defaults = info.defaults
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
        params = SamplingParams(
            max_tokens=self._max_tokens(request, prompt_length),
            min_tokens=request.min_tokens or 0,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=request.biases,
            stop=request.stops,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            skip_special_tokens=request.skip_special_tokens is not False,
            logprobs=logprobs,
            **self._sampling(request),
            **self.exit_parameters(request.exit if has_exit else self.default_exit),
        )
        return [replace(params, seed=_seed(request.seed, index)) for index in range(request.n or 1)]

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        given = {name: getattr(request, name) for name in SAMPLING}
        if given["top_k"] == -1:  # vLLM's value for all tokens
            given["top_k"] = 0
        return self.defaults.sampling(given, samples=True)

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
            usual = room if isinstance(request, ChatRequest) else COMPLETION_TOKENS
            return min(limit, room, self.defaults.max_new_tokens or usual)
        check_limit(param, value, limit, "new tokens")
        return value


def _seed(seed: int | None, index: int) -> int | None:
    """Return the seed of a completion; the first one has the request's own. -1 is vLLM's value for none."""
    return None if seed in (None, -1) else (seed + index) % 2**63
