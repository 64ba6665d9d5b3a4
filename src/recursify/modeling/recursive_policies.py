"""Exit policies: whether a token that has come to an exit is sure enough to stop there.

A policy gives every token a confidence, and a token exits where that is *strictly* above the threshold (FREE, arXiv
2310.05424). An early exit is lossy: what it says is not what the whole model would have said.

Shape legend: s tokens at an exit, one per row; D hidden size; V vocabulary.

This file travels inside every checkpoint: it imports torch and its neighbours only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .recursive_thresholds import AdaptiveThresholds

KV_MODES = ("deferred", "copied", "latest")
"""Where keys and values of the depths that a token skips come from. ``deferred``: computed exactly, together, when a
later token of the row needs them (FREE's synchronized parallel decoding). ``copied``: projected at once from the state
at the exit (CALM's state copying). ``latest``: those of the deepest depth that ran. The last two are approximate."""


class ExitContext:
    """What a policy can look at when ``s`` tokens have come to an exit.

    Args:
        depth: Of the exit, 0 being the first.
        states: Hidden states ``[s, D]`` there.
        previous: Hidden states ``[s, D]`` at the exit before; at the first, the embeddings.
        arrive: Makes of the states what the exit reads out, ``[s, D]``: runs the coda, where exits do.
        read: Makes logits ``[s, V]`` of that, of the first entries of the vocabulary only if it is given their number.
        previous_logits: ``logits`` at the exit before; None at the first, and if the policy does not need them.
        test: Makes the trained log-odds ``[s]`` that the exit says what the last recursion says; None without a head.
        vocabulary: How many entries a policy looks at; None for all.
    """

    def __init__(
        self,
        depth: int,
        states: Tensor,
        previous: Tensor,
        arrive: Callable[[], Tensor],
        read: Callable[[Tensor, int | None], Tensor],
        previous_logits: Tensor | None,
        test: Callable[[], Tensor] | None,
        vocabulary: int | None = None,
    ):
        self.depth = depth
        self.states = states
        self.previous = previous
        self._arrive = arrive
        self._read = read
        self.previous_logits = previous_logits
        self._test = test
        self._vocabulary = vocabulary

    @cached_property
    def exit_states(self) -> Tensor:
        """``[s, D]``: what the exit reads out, made when first asked for."""
        return self._arrive()

    @cached_property
    def logits(self) -> Tensor:
        """``[s, V]`` to judge by, read out when first asked for: on a small model that costs as much as several layers.

        Of the first entries of the vocabulary only, if the policy has a number of them.
        """
        if self._vocabulary is None:
            return self.all_logits
        return self._read(self.exit_states, self._vocabulary)

    @cached_property
    def all_logits(self) -> Tensor:
        """``[s, V]`` of the whole vocabulary."""
        return self._read(self.exit_states, None)

    def known(self, name: str) -> Tensor | None:
        """``exit_states``, ``logits`` or ``all_logits``, if they were asked for."""
        return vars(self).get(name)

    @cached_property
    def log_odds(self) -> Tensor:
        """``[s]``, of the trained test."""
        assert self._test is not None, "policies that need heads are refused without them"
        return self._test()


class ExitLimits(NamedTuple):
    """The numbers that :func:`exits` compares, each one number or a tensor ``[s]``.

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


def exits(confidence: Any, limits: ExitLimits) -> Any:
    """Decide which tokens exit: the one rule for ``generate``, the engine and its device loop.

    Elementwise, for numbers and tensors ``[s]``. It neither branches on data nor synchronizes with the device, so it
    runs under CUDA graphs. With a confidence of ±infinity it tells whether the confidence matters at all.
    """
    free = limits.forced_depth < 0
    sure = (confidence > limits.threshold) & (limits.depth >= limits.min_depth) & (limits.pending <= limits.max_pending)
    forced = (limits.forced_depth >= 0) & (limits.forced_depth <= limits.depth)
    return (free & sure) | forced | (limits.depth >= limits.last_depth)


@dataclass(frozen=True)
class ExitPolicy(ABC):
    """Decides by a confidence.

    Attributes:
        threshold: A token exits where its confidence is above. One number, or one per exit.
        vocabulary: Judge by so many entries of the vocabulary, the first ones, instead of all. In byte-pair encodings
            those are the most frequent. The readout of the others is saved where a token goes on.
        lowest, highest: The range that a threshold may have. No confidence is above ``highest``.
        reads_logits: Whether it looks at logits, so that ``vocabulary`` means something.
        needs_head: Whether the model needs trained exit heads.
        needs_previous_logits: Whether it compares distributions; every exit is then read out.
        simulated: Whether it looks at what the last recursion says, which costs all that an exit saves.
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
            raise ValueError(f"Policy '{self.name}' looks at no logits. Leave vocabulary={self.vocabulary} out.")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ValueError(f"A policy needs 2 entries of the vocabulary at least, got vocabulary={self.vocabulary}.")

    def check_vocabulary(self, size: int) -> None:
        """Raises:
        ValueError: The policy judges by more entries than a model has, which are ``size``.
        """
        if self.vocabulary is not None and self.vocabulary > size:
            raise ValueError(f"vocabulary={self.vocabulary} is more than the model has: {size}.")

    @property
    def name(self) -> str:
        """As :data:`EXIT_POLICIES` has it."""
        named = (name for name, kind in EXIT_POLICIES.items() if kind is type(self))
        return next(named, type(self).__name__)

    def thresholds(self, num_exits: int) -> tuple[float, ...]:
        """One per exit."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * num_exits

    @abstractmethod
    def confidence(self, boundary: ExitContext) -> Tensor:
        """``[s]``, the higher the surer."""


class Fixed(ExitPolicy):
    """Every token exits after the depth that ``threshold`` names."""

    lowest: ClassVar[float] = 0
    highest: ClassVar[float] = math.inf
    default: ClassVar[float] = 0

    def confidence(self, boundary: ExitContext) -> Tensor:
        return boundary.states.new_full((len(boundary.states),), boundary.depth + 0.5)


class Confidence(ExitPolicy):
    """Probability of the first choice less that of the second."""

    reads_logits: ClassVar[bool] = True

    def confidence(self, boundary: ExitContext) -> Tensor:
        best = boundary.logits.float().softmax(-1).topk(2).values
        return best[:, 0] - best[:, 1]


class Entropy(ExitPolicy):
    """1 less the entropy over that of a uniform distribution."""

    reads_logits: ClassVar[bool] = True

    def confidence(self, boundary: ExitContext) -> Tensor:
        log_p = boundary.logits.float().log_softmax(-1)
        return 1 + (log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])


class Saturation(ExitPolicy):
    """Cosine between the hidden states here and at the exit before (CALM)."""

    default: ClassVar[float] = 0.98

    def confidence(self, boundary: ExitContext) -> Tensor:
        # Rounding takes the cosine of a vector with itself above 1.
        return F.cosine_similarity(boundary.states.float(), boundary.previous.float(), dim=-1).clamp(max=1)


class Convergence(ExitPolicy):
    """How little hidden states changed since the exit before: ``1 − |h − h'| / |h|``, 0 at least."""

    default: ClassVar[float] = 0.97

    def confidence(self, boundary: ExitContext) -> Tensor:
        states = boundary.states.float()
        change = (states - boundary.previous.float()).norm(dim=-1) / states.norm(dim=-1).clamp(min=1e-12)
        return (1 - change).clamp(min=0)


class Divergence(ExitPolicy):
    """How little the distribution changed since the exit before: ``exp(−KL(here ‖ before))``; 0 at the first exit."""

    default: ClassVar[float] = 0.9995
    reads_logits: ClassVar[bool] = True
    needs_previous_logits: ClassVar[bool] = True

    def confidence(self, boundary: ExitContext) -> Tensor:
        before = boundary.previous_logits
        if before is None:
            return boundary.states.new_zeros(len(boundary.states), dtype=torch.float32)
        here, before = boundary.logits.float().log_softmax(-1), before.float().log_softmax(-1)
        return torch.exp(-F.kl_div(before, here, log_target=True, reduction="none").sum(-1)).clamp(max=1)


class Head(ExitPolicy):
    """Probability, by the trained test, that the exit says what the last recursion says. It needs no logits."""

    needs_head: ClassVar[bool] = True
    default: ClassVar[float] = 0.8

    def confidence(self, boundary: ExitContext) -> Tensor:
        return boundary.log_odds.float().sigmoid()


class Oracle(ExitPolicy):
    """A simulation: exits at the first depth that says what the last one says, which it has to run to know."""

    simulated: ClassVar[bool] = True
    default: ClassVar[float] = 0.5

    def confidence(self, boundary: ExitContext) -> Tensor:
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
"""By name. An entry of one's own is known to ``generate`` and the command line at once."""


def make_policy(
    name: str,
    threshold: float | Sequence[float] | None = None,
    config: Any = None,
    *,
    vocabulary: int | None = None,
) -> ExitPolicy:
    """The policy ``name`` with a threshold, or one per exit.

    Args:
        name: Of :data:`EXIT_POLICIES`.
        threshold: None takes what ``config`` has for this policy, with the vocabulary that it was chosen for, else the
            policy's default.
        config: Of the model.
        vocabulary: Judge by so many entries of the vocabulary.

    Raises:
        ValueError: Unknown name, a threshold outside its range, or a vocabulary for a policy that reads none.
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


@dataclass(frozen=True)
class ExitSettings:
    """How a call of ``generate`` exits early.

    Attributes:
        policy: When.
        kv: Of :data:`KV_MODES`.
        min_depth: The first depth after which a token may exit.
        max_pending: With ``deferred``: how many tokens of a row may wait for their deeper keys and values; one more
            runs all depths, and the waiting ones with it. Bounds what a step costs.
        decay: CALM's ``τ``: step ``t`` of ``N`` has the threshold ``0.9 λ + 0.1 λ exp(−τ t / N)``, more careful at the
            start; 0 keeps ``λ``.
        layers: Exit after so many layers instead of at recursion boundaries, read out with the model's own norm and
            head: FREE, also of a model with one recursion.
        adapt: Thresholds that are learned in use, in place of the policy's. One object for all rows and calls.
    """

    policy: ExitPolicy
    kv: str = "deferred"
    min_depth: int = 0
    max_pending: int = 64
    decay: float = 0.0
    layers: tuple[int, ...] | None = None
    adapt: AdaptiveThresholds | None = None

    def __post_init__(self) -> None:
        if self.kv not in KV_MODES:
            raise ValueError(f"Unknown kv '{self.kv}'. Use one of: {', '.join(KV_MODES)}.")
        if self.max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {self.max_pending}.")
        if self.min_depth < 0 or self.decay < 0:
            raise ValueError(f"min_depth and decay cannot be negative, got {self.min_depth} and {self.decay:g}.")
        if self.adapt is not None and (self.kv != "deferred" or self.policy.simulated or self.policy.name == "fixed"):
            raise ValueError(
                f"Thresholds are learned from tokens that left early and ran deeper later, by their confidence: policy "
                f"'{self.policy.name}' with kv '{self.kv}' has no such. Use kv 'deferred' and a policy with a "
                f"confidence, or leave adapt out."
            )

    @overload
    @classmethod
    def from_options(cls, policy: None, **options: Any) -> None: ...

    @overload
    @classmethod
    def from_options(cls, policy: str | ExitPolicy | ExitSettings, **options: Any) -> ExitSettings: ...

    @classmethod
    def from_options(
        cls,
        policy: str | ExitPolicy | ExitSettings | None,
        *,
        threshold: float | Sequence[float] | None = None,
        vocabulary: int | None = None,
        kv: str | None = None,
        config: Any = None,
        **options: Any,
    ) -> ExitSettings | None:
        """Make settings from the options of a command line, a request or ``generate``; None without a policy.

        Args:
            policy: Name of a policy, an :class:`ExitPolicy`, :class:`ExitSettings` (returned as they are), or None.
            threshold: Exit threshold, one or one per exit; None takes the model's calibrated one, else the policy's.
            vocabulary: Number of vocabulary entries that the policy scores; None takes the calibrated number.
            kv: KV mode, one of :data:`KV_MODES`; None takes the mode that the model's exits were trained for.
            config: Configuration of the model.
            options: Further fields of :class:`ExitSettings`; None stands for the default.

        Raises:
            ValueError: An unknown policy, a value outside its range, options that exclude one another, or a model
                with routers.
        """
        unknown = options.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"Unknown exit option '{min(unknown)}'. Use fields of ExitSettings.")
        defaults = {name: entry.default for name, entry in cls.__dataclass_fields__.items()}
        options = {name: value for name, value in options.items() if value not in (None, defaults[name])}
        of_policy = {"threshold": threshold, "vocabulary": vocabulary}
        given = [*(name for name, value in of_policy.items() if value is not None), *options]
        if policy is None:
            if given:
                raise ValueError(f"Options of exit policies without a policy: {', '.join(given)}. Name a policy.")
            return None
        if getattr(config, "router", None) is not None:
            raise ValueError("The model has routers, which decide how far a token goes. Leave the exit policy out.")
        # By attribute and not by class: a model loaded with its own code has classes of its own.
        if hasattr(policy, "policy"):
            if given:
                raise ValueError(f"Exit settings and options ({', '.join(given)}) exclude one another. Give one.")
            return cast(ExitSettings, policy)
        if isinstance(policy, str):
            policy = make_policy(policy, threshold, config, vocabulary=vocabulary)
        elif not hasattr(policy, "confidence"):
            raise ValueError(f"exit_policy takes a name, a policy or ExitSettings, or a list of those, not {policy!r}.")
        elif threshold is not None or vocabulary is not None:
            raise ValueError(f"An exit policy and options of one ({', '.join(given)}) exclude one another. Give one.")
        kv = kv or str(getattr(config, "exit_kv", "deferred"))
        return cls(policy, kv=kv, **options)

    def threshold_at(self, depth: int, num_exits: int, step: int, num_steps: int) -> float:
        """The threshold of an exit at a 0-based step of ``num_steps``."""
        policy, adapt = self.policy, self.adapt
        threshold = policy.thresholds(num_exits)[depth] if adapt is None else adapt.threshold(depth)
        if not self.decay:
            return threshold
        return 0.9 * threshold + 0.1 * threshold * math.exp(-self.decay * step / max(num_steps, 1))
