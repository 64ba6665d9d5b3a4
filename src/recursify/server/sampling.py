"""From a request to what the engine takes, within the limits of the server."""

from __future__ import annotations

from typing import Any

from recursify.engine import SamplingParams

from .errors import ApiError
from .schema import AnswerRequest, ChatRequest
from .settings import ExitChoice, ServerSettings

COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many: OpenAI's default. A chat goes on to the end."""


class Sampling:
    """Makes parameters for one engine.

    Args:
        settings: Limits, and how tokens leave by default.
        config: Of the model.
        kv: The engine's.
        max_model_len: Tokens of a request, prompt and answer.
    """

    def __init__(self, settings: ServerSettings, config: Any, kv: str, max_model_len: int) -> None:
        self.settings, self.config, self.kv, self.max_model_len = settings, config, kv, max_model_len

    def for_each_choice(self, request: AnswerRequest, prompt_length: int, logprobs: int | None) -> list[SamplingParams]:
        """One set per choice: they differ in their seeds.

        Raises:
            ApiError: More than the server allows.
        """
        self._check_limits(request)
        count = request.n or 1
        choice = self.settings.default_exit
        if request.exit_is_given:
            choice = None if request.exit is None else request.exit.choice
        leaves = self.leaving(choice)
        return [
            SamplingParams(
                max_tokens=self._max_tokens(request, prompt_length),
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=request.top_k or 0,
                seed=None if request.seed is None else _seed(request.seed, number),
                stop=request.stops,
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=bool(request.ignore_eos),
                logprobs=logprobs,
                **leaves,
            )
            for number in range(count)
        ]

    def leaving(self, choice: ExitChoice | None) -> dict[str, Any]:
        """The part of the parameters that says how tokens leave."""
        if choice is None:
            return {}
        return {"exit": choice.settings(self.config, self.kv), "max_depth": choice.max_depth}

    def _check_limits(self, request: AnswerRequest) -> None:
        limits = self.settings
        if (request.n or 1) > limits.max_choices:
            raise _over("n", f"At most {limits.max_choices} choices can be asked for.")
        if len(request.stops) > limits.max_stops:
            raise _over("stop", f"At most {limits.max_stops} stop strings are allowed, got {len(request.stops)}.")
        if any(len(stop) > limits.max_stop_characters for stop in request.stops):
            raise _over("stop", f"A stop string may have {limits.max_stop_characters} characters.")

    def _max_tokens(self, request: AnswerRequest, prompt_length: int) -> int:
        limit = self.settings.max_tokens
        param, asked = "max_tokens", getattr(request, "max_tokens", None)
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            param, asked = "max_completion_tokens", request.max_completion_tokens
        if asked is None:
            room = max(self.max_model_len - prompt_length, 1)
            return min(limit, room, room if isinstance(request, ChatRequest) else COMPLETION_TOKENS)
        if asked > limit:
            raise _over(param, f"At most {limit} new tokens are allowed.")
        return asked


def _over(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="limit_exceeded")


def _seed(seed: int, number: int) -> int:
    """Of the choice of that number; the first one's is the request's own."""
    return seed if number == 0 else (seed + number) % 2**63
