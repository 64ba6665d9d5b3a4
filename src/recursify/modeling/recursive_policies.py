"""Exit policies: the confidence of a token at an exit, and the rule that decides whether it exits there.

A policy gives every token a confidence, and a token exits where that is *strictly* above the threshold (FREE, arXiv
2310.05424). An early exit is lossy: its logits are not those of the whole model.

Shape legend: s tokens at an exit, one per row; D hidden size; V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class ExitContext:
    """Input of a policy: ``s`` tokens at an exit.

    Attributes:
        depth: Depth of the exit, 0 being the first.
        states: Hidden states ``[s, D]`` at the exit.
        previous: Hidden states ``[s, D]`` at the exit before; at the first, the embeddings.
        arrive: Function that computes the input ``[s, D]`` of the exit head: it runs the coda where exits do.
        read: Function that computes logits ``[s, V]`` of that input, or of a number of first vocabulary entries.
        previous_logits: Logits at the exit before; None at the first, and if the policy does not need them.
        test: Function that computes the trained log-odds ``[s]`` of agreement with the last recursion; None without
            exit heads.
        vocabulary: Number of vocabulary entries that the policy scores; None for all.
    """

    depth: int
    states: Tensor
    previous: Tensor
    arrive: Callable[[], Tensor]
    read: Callable[[Tensor, int | None], Tensor]
    previous_logits: Tensor | None
    test: Callable[[], Tensor] | None
    vocabulary: int | None = None

    @cached_property
    def exit_states(self) -> Tensor:
        """Input ``[s, D]`` of the exit head, computed on first use."""
        return self.arrive()

    @cached_property
    def logits(self) -> Tensor:
        """Logits ``[s, V]`` to score, computed on first use: on a small model they cost as much as several layers."""
        return self.all_logits if self.vocabulary is None else self.read(self.exit_states, self.vocabulary)

    @cached_property
    def all_logits(self) -> Tensor:
        """Logits ``[s, V]`` of the whole vocabulary."""
        return self.read(self.exit_states, None)

    def known(self, name: str) -> Tensor | None:
        """``exit_states``, ``logits`` or ``all_logits`` if they have been computed, else None."""
        return vars(self).get(name)

    @cached_property
    def log_odds(self) -> Tensor:
        """Log-odds ``[s]`` of the trained test."""
        assert self.test is not None, "policies that need heads are refused without them"
        return self.test()


class ExitLimits(NamedTuple):
    """The numbers that :func:`decide_exits` compares, each one number or a tensor ``[s]``.

    Attributes:
        depth: Depth that the token has run.
        last_depth: Depth after which every token exits.
        threshold: Confidence above which the token exits; infinite without a policy.
        min_depth: First depth after which the policy may let it exit.
        pending: Number of tokens of its sequence, itself included, whose deeper keys and values are deferred.
        max_pending: Number of them above which the policy does not let it exit.
        forced_depth: Depth at which the token exits whatever its confidence; negative for none.
    """

    depth: Any
    last_depth: Any
    threshold: Any = math.inf
    min_depth: Any = 0
    pending: Any = 0
    max_pending: Any = 0
    forced_depth: Any = -1


def decide_exits(confidence: Any, limits: ExitLimits) -> Any:
    """Decide which tokens exit: the one rule for ``generate``, the engine and its device loop.

    Elementwise, for numbers and tensors ``[s]``. It neither branches on data nor synchronizes with the device, so it
    runs under CUDA graphs. With −infinity it is
    true if the token exits whatever its confidence; with +infinity, if any confidence lets it exit.
    """
    free = limits.forced_depth < 0
    sure = (confidence > limits.threshold) & (limits.depth >= limits.min_depth) & (limits.pending <= limits.max_pending)
    forced = (limits.forced_depth >= 0) & (limits.forced_depth <= limits.depth)
    return (free & sure) | forced | (limits.depth >= limits.last_depth)


@dataclass(frozen=True)
class ExitPolicy(ABC):
    """Base of exit policies.

    Attributes:
        threshold: Confidence above which a token exits, one number or one per exit.
        vocabulary: Number of first vocabulary entries to score instead of all, which saves the logits of the others
            where a token does not exit; in byte-pair encodings those are the most frequent.
        lowest, highest: Range of thresholds. No confidence is above ``highest``.
        default: Threshold of an uncalibrated model.
        reads_logits: Flag for policies that use logits, and so support ``vocabulary``.
        needs_head: Flag for policies that need trained exit heads.
        needs_previous_logits: Flag for policies that compare distributions, which need the logits of every exit.
        simulated: Flag for policies that use the last recursion's output, which costs all that an exit saves.
    """

    threshold: float | tuple[float, ...]
    vocabulary: int | None = None
    lowest: ClassVar[float] = -1.0
    highest: ClassVar[float] = 1.0
    default: ClassVar[float] = 0.9
    reads_logits: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False
    needs_previous_logits: ClassVar[bool] = False
    simulated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for value in self.thresholds(1):  # all of them, where there are several
            if not self.lowest <= value <= self.highest:
                raise ValueError(
                    f"threshold {value:g} is outside {self.lowest:g} .. {self.highest:g}, the range of policy "
                    f"'{self.name}'. A token exits where its confidence is above."
                )
        if self.vocabulary is not None and not self.reads_logits:
            raise ValueError(f"Policy '{self.name}' does not use logits. Leave vocabulary={self.vocabulary} out.")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ValueError(f"A policy needs at least 2 entries of the vocabulary, got vocabulary={self.vocabulary}.")

    def check_vocabulary(self, size: int) -> None:
        """Require that the model's ``size`` entries are as many as the policy scores."""
        if self.vocabulary is not None and self.vocabulary > size:
            raise ValueError(f"vocabulary={self.vocabulary} is more than the model has: {size}. Give fewer entries.")

    @property
    def name(self) -> str:
        """Name of the policy in :data:`EXIT_POLICIES`."""
        return next((name for name, kind in EXIT_POLICIES.items() if kind is type(self)), type(self).__name__)

    def thresholds(self, num_exits: int) -> tuple[float, ...]:
        """Thresholds, one per exit."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * num_exits

    @abstractmethod
    def confidence(self, context: ExitContext) -> Tensor:
        """Confidence ``[s]``; a token above the threshold exits."""


class Fixed(ExitPolicy):
    """Fixed depth: every token exits after the depth ``threshold``."""

    lowest: ClassVar[float] = 0
    highest: ClassVar[float] = math.inf
    default: ClassVar[float] = 0

    def confidence(self, context: ExitContext) -> Tensor:
        return context.states.new_full((len(context.states),), context.depth + 0.5)


class Confidence(ExitPolicy):
    """Probability of the top-1 token minus that of the second."""

    reads_logits: ClassVar[bool] = True

    def confidence(self, context: ExitContext) -> Tensor:
        best = context.logits.float().softmax(-1).topk(2).values
        return best[:, 0] - best[:, 1]


class Entropy(ExitPolicy):
    """1 minus the entropy relative to a uniform distribution."""

    reads_logits: ClassVar[bool] = True

    def confidence(self, context: ExitContext) -> Tensor:
        log_p = context.logits.float().log_softmax(-1)
        return 1 + (log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])


class Saturation(ExitPolicy):
    """Cosine between the hidden states here and at the exit before (CALM)."""

    default: ClassVar[float] = 0.98

    def confidence(self, context: ExitContext) -> Tensor:
        # Rounding can put the cosine of a vector with itself above 1.
        return F.cosine_similarity(context.states.float(), context.previous.float(), dim=-1).clamp(max=1)


class Convergence(ExitPolicy):
    """Relative change of hidden states since the exit before: ``1 − |h − h'| / |h|``, at least 0."""

    default: ClassVar[float] = 0.97

    def confidence(self, context: ExitContext) -> Tensor:
        states = context.states.float()
        change = (states - context.previous.float()).norm(dim=-1) / states.norm(dim=-1).clamp(min=1e-12)
        return (1 - change).clamp(min=0)


class Divergence(ExitPolicy):
    """Change of the distribution since the exit before: ``exp(−KL(here ‖ before))``; 0 at the first exit."""

    default: ClassVar[float] = 0.9995
    reads_logits: ClassVar[bool] = True
    needs_previous_logits: ClassVar[bool] = True

    def confidence(self, context: ExitContext) -> Tensor:
        before = context.previous_logits
        if before is None:
            return context.states.new_zeros(len(context.states), dtype=torch.float32)
        here, before = context.logits.float().log_softmax(-1), before.float().log_softmax(-1)
        return torch.exp(-F.kl_div(before, here, log_target=True, reduction="none").sum(-1)).clamp(max=1)


class Head(ExitPolicy):
    """Probability, by the trained test, that exit and last recursion agree. It needs no logits."""

    needs_head: ClassVar[bool] = True
    default: ClassVar[float] = 0.8

    def confidence(self, context: ExitContext) -> Tensor:
        return context.log_odds.float().sigmoid()


class Oracle(ExitPolicy):
    """Simulation: exits at the first depth that agrees with the last one, which has to run to know."""

    simulated: ClassVar[bool] = True
    default: ClassVar[float] = 0.5

    def confidence(self, context: ExitContext) -> Tensor:
        raise AssertionError("the decoder compares choices when all depths have run")


EXIT_POLICIES: dict[str, type[ExitPolicy]] = {
    "head": Head,
    "confidence": Confidence,
    "entropy": Entropy,
    "saturation": Saturation,
    "convergence": Convergence,
    "divergence": Divergence,
    "fixed": Fixed,
    "oracle": Oracle,
}
"""Policies by name. ``generate`` and the command line find an entry that you add."""


def make_policy(
    name: str, threshold: float | Sequence[float] | None = None, config: Any = None, *, vocabulary: int | None = None
) -> ExitPolicy:
    """The policy ``name`` with a threshold, or one per exit.

    Args:
        name: Name in :data:`EXIT_POLICIES`.
        threshold: Threshold, one or one per exit; None takes the calibrated one of ``config`` with the vocabulary that
            it was calibrated for, else the policy's default.
        config: Configuration of the model.
        vocabulary: Number of vocabulary entries to score.

    Raises:
        ValueError: Unknown name, a threshold outside its range, or a vocabulary for a policy without logits.
    """
    if name not in EXIT_POLICIES:
        raise ValueError(f"Unknown exit policy '{name}'. Use one of: {', '.join(EXIT_POLICIES)}.")
    kind = EXIT_POLICIES[name]
    calibrated = threshold is None and getattr(config, "exit_policy", None) == name
    if calibrated and vocabulary in (None, config.exit_vocabulary):
        threshold, vocabulary = config.exit_thresholds, config.exit_vocabulary
    if threshold is None:
        threshold = kind.default
    return kind(tuple(map(float, threshold)) if isinstance(threshold, Sequence) else float(threshold), vocabulary)
