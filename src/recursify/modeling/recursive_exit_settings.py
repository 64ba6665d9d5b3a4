"""Settings of early exit, and their checks against a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, overload

from torch import Tensor

from .recursive_exits import KV_MODES
from .recursive_layers import MASKED_ATTENTION
from .recursive_policies import ExitPolicy, make_policy


class LearnedThresholds(Protocol):
    """Thresholds that change in use, as ``recursify.experiments.adaptive_thresholds`` has them."""

    @property
    def learning(self) -> bool:
        """Flag for thresholds that still learn."""

    def threshold(self, depth: int) -> float:
        """Threshold of the exit after ``depth``."""

    def begin(self, num_sequences: int) -> None:
        """Prepare for ``num_sequences`` new sequences."""

    def learn(self, depth: int, confidence: Tensor, agrees: Tensor, counted: Tensor) -> None:
        """Record the confidence of tokens and their agreement with the whole model, where ``counted``."""


@dataclass(frozen=True)
class ExitSettings:
    """Settings of early exit for one call of ``generate`` or one request.

    Attributes:
        policy: Policy that decides.
        kv: KV mode, one of :data:`KV_MODES`.
        min_depth: First depth after which a token may exit.
        max_pending: Maximum number of tokens of a row whose deeper keys and values are deferred; one more runs all
            depths, with the deferred ones. It bounds the cost of a step.
        decay: CALM's ``τ``: step ``t`` of ``N`` has the threshold ``0.9 λ + 0.1 λ exp(−τ t / N)``, more careful at the
            start; 0 keeps ``λ``.
        layers: Numbers of layers to exit after instead of at recursion boundaries, with the model's own norm and head
            (FREE); also for a model with one recursion.
        adapt: Thresholds learned in use, in place of the policy's; one object for all rows and calls.
    """

    policy: ExitPolicy
    kv: str = "deferred"
    min_depth: int = 0
    max_pending: int = 64
    decay: float = 0.0
    layers: tuple[int, ...] | None = None
    adapt: LearnedThresholds | None = None

    def __post_init__(self) -> None:
        if self.kv not in KV_MODES:
            raise ValueError(f"Unknown kv '{self.kv}'. Use one of: {', '.join(KV_MODES)}.")
        if self.max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {self.max_pending}.")
        if self.min_depth < 0 or self.decay < 0:
            raise ValueError(f"min_depth and decay cannot be negative, got {self.min_depth} and {self.decay:g}.")
        if self.adapt is not None and (self.kv != "deferred" or self.policy.simulated or self.policy.name == "fixed"):
            raise ValueError(
                f"Adaptive thresholds learn from tokens that exited and ran deeper later, by their confidence: policy "
                f"'{self.policy.name}' with kv '{self.kv}' does not have these. Use kv 'deferred' and a policy with a "
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
            policy: Name of a policy, an :class:`ExitPolicy`, or :class:`ExitSettings`, which are returned.
            threshold: Exit threshold, one or one per exit; None takes the model's calibrated one, else the policy's.
            vocabulary: Number of vocabulary entries that the policy scores; None takes the calibrated number.
            kv: KV mode, one of :data:`KV_MODES`; None takes the mode that the model's exits were trained for.
            config: Configuration of the model.
            options: Further fields of :class:`ExitSettings`; None stands for the default.

        Raises:
            ValueError: An unknown policy, a value outside its range, a clash of options, or a model with routers.
        """
        defaults = {name: entry.default for name, entry in cls.__dataclass_fields__.items()}
        if unknown := options.keys() - defaults.keys():
            raise ValueError(f"Unknown exit option '{min(unknown)}'. Use fields of ExitSettings.")
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
        return cls(policy, kv=kv or str(getattr(config, "exit_kv", "deferred")), **options)

    def threshold_at(self, depth: int, num_exits: int, step: int, num_steps: int) -> float:
        """Threshold of an exit at a 0-based step of ``num_steps``."""
        adapt = self.adapt
        threshold = self.policy.thresholds(num_exits)[depth] if adapt is None else adapt.threshold(depth)
        if not self.decay:
            return threshold
        return 0.9 * threshold + 0.1 * threshold * math.exp(-self.decay * step / max(num_steps, 1))


def check_depths(settings: ExitSettings, num_exits: int) -> None:
    """Check that the model has the exits of the settings.

    Raises:
        ValueError: Settings for exits that the model does not have.
    """
    policy, thresholds = settings.policy, settings.policy.thresholds(num_exits)
    if len(thresholds) != num_exits:
        raise ValueError(f"Policy '{policy.name}' has {len(thresholds)} thresholds, and the model {num_exits} exits.")
    depth = max(settings.min_depth, *(policy.thresholds(1) if policy.name == "fixed" else (0,)))
    if depth >= num_exits:
        raise ValueError(
            f"There is no exit after depth {depth:g}: the model has {num_exits}, after depths 0 to {num_exits - 1}."
        )


def layers_before_exits(model: Any, settings: ExitSettings) -> list[int]:
    """Number of layers before each exit.

    Raises:
        ValueError: A model without exits, or without those asked for.
    """
    config, layout = model.config, model.config.layout
    if config.anderson:
        raise ValueError(
            f"The model mixes loops (anderson={config.anderson}), and tokens that exit between loops cannot be mixed. "
            f"Make it with_recursions(..., anderson=0) for an exit policy or speculation."
        )
    if config.exit_depth is not None:
        raise ValueError(
            f"The model is set to exit after depth {config.exit_depth} always (config.exit_depth). Set it to None for "
            f"an exit policy."
        )
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"Exit policies need attention that takes any mask ({' or '.join(MASKED_ATTENTION)}), and the model's is "
            f"'{config._attn_implementation}'. Load it with attn_implementation='sdpa'."
        )
    settings.policy.check_vocabulary(config.vocab_size)
    if settings.layers is not None:
        bad = [layer for layer in settings.layers if not 0 < layer < layout.num_layers]
        if bad or list(settings.layers) != sorted(set(settings.layers)) or not settings.layers:
            raise ValueError(
                f"layers={settings.layers} must be rising numbers of layers from 1 to {layout.num_layers - 1}, after "
                f"which a token may exit."
            )
        if settings.policy.needs_head or settings.kv == "latest":
            what = f"policy '{settings.policy.name}'" if settings.policy.needs_head else "kv 'latest'"
            raise ValueError(f"{what} works at recursion boundaries only. Leave layers out, or choose another.")
        return list(settings.layers)
    if not config.exit_depths:
        raise ValueError(
            f"A model with {layout.num_recursions} recursions in {layout.order} sharing has no boundary to exit at. "
            f"Give layers=(…,) to exit after so many layers."
        )
    if settings.policy.needs_head and model.exit_heads is None:
        raise ValueError(
            f"Policy '{settings.policy.name}' needs exit heads, and the model has none. Train them (recursify uptrain "
            f"--stage exits), or use policy 'confidence'."
        )
    return [layout.layers_before(depth) for depth in config.exit_depths]
