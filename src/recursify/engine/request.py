"""Requests: their sampling parameters, their state in the engine, and their output."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AllowInfNan, Strict

from recursify.errors import EngineError
from recursify.modeling import ExitSettings
from recursify.settings import Fraction, Settings

from .detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "cancelled"]

UNREAD = -1
"""Placeholder for a token id that has not been copied to the host yet."""


NonNegative = Annotated[int, Strict(), Ge(0)]
"""Whole number of at least 0."""
Penalty = Annotated[float, Ge(-2), Le(2)]
"""Number from -2 to 2, the range of OpenAI's penalties."""


class SamplingParams(Settings, error=EngineError):
    """Sampling parameters and limits of one request.

    Raises:
        EngineError: A parameter is unknown, or its value is out of its range.
    """

    max_tokens: Annotated[int, Strict(), Ge(1)] = 64
    """Maximum number of new tokens."""

    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature; 0 is greedy."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Probability mass of the most likely tokens to sample from; 1 keeps all tokens."""

    top_k: NonNegative = 0
    """Number of most likely tokens to sample from; 0 keeps all."""

    min_p: Fraction = 0.0
    """Probability that a token to sample must have, relative to that of the most likely one; 0 keeps all."""

    repetition_penalty: Annotated[float, Gt(0), AllowInfNan(False)] = 1.0
    """Divisor of positive logits, and factor of others, of tokens in the prompt or the output; 1 changes none."""

    frequency_penalty: Penalty = 0.0
    """Number that is subtracted from a token's logit for each time that it is in the output."""

    presence_penalty: Penalty = 0.0
    """Number that is subtracted from the logits of tokens in the output."""

    logit_bias: dict[NonNegative, Annotated[float, AllowInfNan(False)]] = field(default_factory=dict)
    """Mapping from token ids to numbers that are added to their logits."""

    seed: Annotated[int, Strict(), Ge(0), Le(2**63 - 1)] | None = None
    """Seed of the request's own generator, so that its samples do not depend on the batch; None takes a random one."""

    stop: tuple[Annotated[str, MinLen(1), "a non-empty string"], ...] = ()
    """Strings that end the text, of special tokens too; they are not part of it."""

    stop_token_ids: tuple[NonNegative, ...] = ()
    """Tokens that end the text, besides EOS; they are not part of it."""

    ignore_eos: bool = False
    """Continue after EOS."""

    min_tokens: NonNegative = 0
    """Number of new tokens among which neither EOS nor a stop token is sampled, and no stop string is searched for."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    logprobs: Annotated[int, Strict(), Ge(0), Le(20)] | None = None
    """Number of most likely tokens whose log-probabilities to return, with that of the sampled token. They are the
    model's own, before penalties, biases and temperature. None returns none."""

    exit: Any = None
    """Early exit, which is lossy: the name of a policy, a policy, or :class:`~recursify.modeling.ExitSettings`."""

    max_depth: NonNegative | None = None
    """Last depth that a new token runs; None for all. The prompt runs all of them."""

    forced_depths: tuple[NonNegative, ...] | None = None
    """Depths after which the new tokens exit, in place of a policy, for measurements: they start with the second new
    token (the first one comes from the prompt), and repeat if there are fewer than tokens."""

    def __post_init__(self) -> None:
        others = self.exit is not None or self.max_depth is not None
        if self.forced_depths is not None and (others or not self.forced_depths):
            raise EngineError(
                "forced_depths take the place of exit and max_depth, and name at least one depth. Leave the others out."
            )
        if self.min_tokens > self.max_tokens:
            raise EngineError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens}). Lower it.")

    @property
    def changes_logits(self) -> bool:
        """True if logits differ from the model's for every token."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(penalties or self.logit_bias)

    @property
    def may_exit_early(self) -> bool:
        """True if tokens may exit before the last recursion."""
        return self.exit is not None or self.max_depth is not None or self.forced_depths is not None


@dataclass
class RequestOutput:
    """Output of a request, complete or so far.

    Attributes:
        request_id: Id that :meth:`Engine.add` returned.
        prompt_ids: Token ids of the prompt.
        token_ids: Generated tokens, including one that ended the text.
        text: Generated text, up to a stop string, or the token that ended it.
        depths: Last depth that was run for each generated token.
        finish_reason: ``stop``, ``length`` or ``cancelled``; None while the request runs.
        logprobs: Mapping from token id to log-probability for each generated token, if requested.
        cached_tokens: Number of prompt tokens taken from the prefix cache.
        preemptions: Number of preemptions.
    """

    request_id: int
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    depths: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] | None = None
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def finished(self) -> bool:
        """True if the output is complete."""
        return self.finish_reason is not None


class Request:
    """State of a request in the engine. Only the scheduler and the engine change it.

    Attributes:
        settings: Exit settings; None for no policy.
        ends: Tokens that end the text.
        tokens: Token ids of the prompt, then of the output.
        computed: Number of tokens that have been through the model.
        exit_depths: Depth after which each new token exited. Tokens that are computed again after a preemption exit
            after the same depths.
        full_until: Position before which all tokens have run all recursions (``deferred`` keys and values only).
        deferred: Mapping from depth to the positions and states ``[n, D]`` of tokens that exited before it, and will
            run it together with the next token of the request that gets there.
        tables: Block table of each stream: the request's pages (``layers/kv_cache.py``).
        packed: Mapping from depth to the positions of the tokens that ran it, in a routed model.
        prefix_keys: Keys of the prompt's full pages, once they have been looked up in the prefix cache.
        rope_length: Length by which RoPE that depends on it rotates the prompt (``layers/length_rope.py``).
    """

    _ids = itertools.count()

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        settings: ExitSettings | None,
        num_streams: int,
        detokenizer: Detokenizer | None = None,
        ends: Collection[int] = (),
    ) -> None:
        self.id = next(self._ids)
        self.prompt_ids, self.params, self.settings = list(prompt_ids), params, settings
        self.ends = frozenset(ends)
        self.num_streams = num_streams  # of the KV cache
        self.detokenizer = detokenizer or Detokenizer(None, ())
        self.tokens = list(prompt_ids)
        self.output = RequestOutput(self.id, self.prompt_ids, logprobs=None if params.logprobs is None else [])
        self.exit_depths: list[int] = []
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self._draws: deque[float] = deque()  # random numbers that no token has used yet
        self.full_until = 0
        self.prefix_keys: list[bytes] | None = None
        self.rope_length = len(self.prompt_ids)
        self.reset()

    def reset(self) -> None:
        """Discard everything computed; the generated tokens and their exit depths remain."""
        self.computed = 0
        self.deferred: dict[int, tuple[list[int], torch.Tensor]] = {}
        self.tables: list[list[int]] = [[] for _ in range(self.num_streams)]
        self.packed: dict[int, list[int]] = {}

    def next_draws(self, count: int) -> list[float]:
        """Random numbers in [0, 1) for the next ``count`` tokens; :meth:`use_draw` consumes them one by one."""
        while len(self._draws) < count:
            self._draws.append(float(torch.rand(1, generator=self.generator, dtype=torch.float64)))
        return list(itertools.islice(self._draws, count))

    def use_draw(self) -> float:
        """Consume the random number of the token that is sampled now."""
        self.next_draws(1)
        return self._draws.popleft()

    @property
    def changes_logits(self) -> bool:
        """True if the logits of the next token are changed before it is sampled."""
        return self.params.changes_logits or self.num_new < self.params.min_tokens

    @property
    def biases(self) -> Iterable[tuple[int, float]]:
        """Numbers to add to logits of the next token, by token id."""
        ruled_out = self.ends if self.num_new < self.params.min_tokens else ()
        return itertools.chain(self.params.logit_bias.items(), ((token, -math.inf) for token in ruled_out))

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt_ids)

    @property
    def num_new(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def is_complete(self) -> bool:
        """True if all of its tokens have been sampled; the last one may not have been copied to the host yet."""
        return self.num_new >= self.params.max_tokens

    @property
    def finished(self) -> bool:
        """True if the output is complete."""
        return self.output.finished
