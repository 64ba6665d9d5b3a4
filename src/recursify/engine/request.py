"""What is asked of the engine, what it keeps of that while it works, and what it answers."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from recursify.errors import EngineError
from recursify.modeling import ExitSettings

FinishReason = Literal["stop", "length", "cancelled"]

UNREAD = -1
"""Stands in a request's tokens for one that the host has not seen yet."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is answered.

    Attributes:
        max_tokens: New tokens at most.
        temperature: 0 is greedy.
        top_p: Smallest set of tokens with so much probability; 1 keeps all.
        top_k: So many tokens; 0 keeps all.
        seed: Of the request's own draws, which do not depend on what else is in the batch. None draws a seed.
        stop: Strings at which the text ends; they are not part of it.
        stop_token_ids: Tokens that end it, besides the model's own.
        ignore_eos: Go on after the model's own end of text.
        logprobs: Also return the log-probabilities of so many first choices, and of the token chosen, as the model
            gives them (before temperature); None for none.
        exit: Lets tokens leave early: a policy by name, a policy, or :class:`~recursify.modeling.ExitSettings`. Lossy.
        max_depth: The last recursion that a new token runs; None for all. The prompt runs all of them.
        forced_depths: For measurements: the depth that new token ``i`` (from the second on; the first comes from the
            prompt) leaves after, in place of a policy; repeated if it is shorter.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    exit: Any = None
    max_depth: int | None = None
    forced_depths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises:
        EngineError: A value outside its range.
        """
        whole = {name: getattr(self, name) for name in ("max_tokens", "top_k", "seed", "logprobs", "max_depth")}
        for name, value in whole.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise EngineError(f"{name} must be a whole number, got {value!r}.")
        ranges = {
            "max_tokens": (self.max_tokens, 1, None),
            "temperature": (self.temperature, 0, None),
            "top_k": (self.top_k, 0, None),
            "logprobs": (self.logprobs, 0, 20),
            "seed": (self.seed, 0, 2**63 - 1),
            "max_depth": (self.max_depth, 0, None),
        }
        for name, (value, lowest, highest) in ranges.items():
            if value is not None and not (lowest <= value and (highest is None or value <= highest)):
                upper = "" if highest is None else f", {highest} at most"
                raise EngineError(f"{name} must be {lowest} or more{upper}, got {value}.")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p must be above 0 and 1 at most, got {self.top_p}.")
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            raise EngineError(f"stop takes a tuple of strings, none of them empty, got {self.stop!r}.")
        for name, values in (("stop_token_ids", self.stop_token_ids), ("forced_depths", self.forced_depths or (0,))):
            if not isinstance(values, tuple) or not all(isinstance(each, int) and each >= 0 for each in values):
                raise EngineError(f"{name} takes a tuple of whole numbers, none of them negative, got {values!r}.")
        others = self.exit is not None or self.max_depth is not None
        if self.forced_depths is not None and (others or not self.forced_depths):
            raise EngineError(
                "forced_depths stand in place of exit and max_depth, and name at least one depth. Leave the others out."
            )

    @property
    def may_exit_early(self) -> bool:
        """Whether tokens may leave before the last recursion."""
        return self.exit is not None or self.max_depth is not None or self.forced_depths is not None


@dataclass
class RequestOutput:
    """An answer, whole or as far as it has come.

    Attributes:
        request_id: As :meth:`Engine.add` returned it.
        prompt_ids: Of the prompt.
        token_ids: New tokens; a token that ended the text is among them.
        text: Without what a stop string cut off.
        depths: Per new token, the last recursion of the forward that it was read from.
        finish_reason: ``stop``, ``length``, ``cancelled``; None while it goes on.
        logprobs: Per new token ``{token id: log-probability}``, if asked for.
        cached_tokens: Tokens of the prompt whose keys and values were there already.
        preemptions: How often the request had to give its pages back and begin again.
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
        """Whether no more will come."""
        return self.finish_reason is not None


class Request:
    """A request in the engine. Only the scheduler and the engine change it.

    Attributes:
        tokens: Of the prompt, then the new ones.
        computed: How many of them have been through the model.
        left: The depth that each new token has left after, by its place among the new ones: what is run again after a
            preemption leaves where it left.
        full_until: Positions before this one have run all recursions (``deferred`` keys and values only).
        waiting: By depth, the positions and states ``[n, D]`` of tokens that left before it, and will run it together
            with the next token that goes so deep.
        tables: By stream of keys and values, the request's pages (``kv_pages.py``).
        packed: By depth, in a routed model, the positions of the tokens that went there.
    """

    _ids = itertools.count()

    def __init__(
        self, prompt_ids: Sequence[int], params: SamplingParams, settings: ExitSettings | None, num_streams: int
    ) -> None:
        self.id = next(self._ids)
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.settings = settings
        self.tokens = list(prompt_ids)
        self.output = RequestOutput(self.id, self.prompt_ids, logprobs=None if params.logprobs is None else [])
        self.exit_depths: list[int] = []
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self._draws: deque[float] = deque()  # made, and not used yet
        self.full_until = 0
        self.prefix_keys: list[bytes] | None = None  # of its prompt's pages, once they have been looked for
        self.num_streams = num_streams
        self.text: Any = None  # its Detokenizer
        self.reset()

    def reset(self) -> None:
        """Forget all that has been computed; what has been said stays, and where it left."""
        self.computed = 0
        self.deferred: dict[int, tuple[list[int], torch.Tensor]] = {}
        self.tables: list[list[int]] = [[] for _ in range(self.num_streams)]
        self.packed: dict[int, list[int]] = {}

    def next_draws(self, count: int) -> list[float]:
        """Numbers from 0 to 1 that the next ``count`` tokens will be drawn by; :meth:`use_draw` says when one is."""
        while len(self._draws) < count:
            self._draws.append(float(torch.rand(1, generator=self.generator, dtype=torch.float64)))
        return list(itertools.islice(self._draws, count))

    def use_draw(self) -> float:
        """The number for a token that is said now."""
        self.next_draws(1)
        return self._draws.popleft()

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_new(self) -> int:
        """Tokens said so far."""
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def is_complete(self) -> bool:
        """Whether it has as many tokens as it may; the host may not have seen the last one yet."""
        return self.num_new >= self.params.max_tokens

    @property
    def finished(self) -> bool:
        return self.output.finished
