"""Settings of a generation: options of ``recursify generate`` and keywords of ``generate_text``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from recursify.errors import SettingsError
from recursify.settings import Fraction, Option, Settings


class GenerationSettings(Settings):
    """Options of ``recursify generate``; a YAML file given with ``--config`` has the same names."""

    panels: ClassVar[Mapping[str, str]] = {
        "max_new_tokens": "Generation",
        "exit_policy": "Early exit",
        "speculate": "Speculation and recursions",
    }

    max_new_tokens: PositiveInt = 64
    """Maximum number of new tokens."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Fraction = 1.0
    """Nucleus probability for sampling."""
    seed: int = 0
    """Seed for sampling."""
    chat: bool = False
    """Apply the model's chat template to the prompt."""
    measure: Annotated[bool, Option("--stats")] = False
    """Report tokens per second; with early exit or speculation also their statistics, and the speed of plain
    decoding."""

    exit_policy: Annotated[str | None, Option("--exit")] = None
    """Exit policy: head, confidence, entropy, saturation, convergence, divergence, fixed (at the depth that the
    threshold names) or oracle (a simulation). Early exit changes the output. Without it, every token runs all
    recursions."""
    threshold: float | None = None
    """Confidence above which tokens exit. Without it, the calibrated threshold, else the policy's."""
    vocabulary: PositiveInt | None = None
    """Score only the first N vocabulary entries. Without it, as calibrated."""
    kv: str | None = None
    """KV cache of skipped depths: deferred (exact), copied or latest. Without it, the model's own."""
    min_depth: NonNegativeInt = 0
    """First depth after which tokens may exit."""
    max_pending: PositiveInt = 64
    """Maximum number of tokens that wait for their deferred depths."""

    speculate: bool = False
    """Draft with the first recursion and verify with the full model: the same output, in fewer calls."""
    recursions: Annotated[PositiveInt | None, Option("--recursions", "-r")] = None
    """Number of times to apply the shared block. Without it, as converted."""
    residual_scale: float | None = None
    """Factor of each shared layer's update (requires recursions). Without it, the model's own number of recursions
    divided by the new one."""
    anderson: NonNegativeInt = 0
    """Anderson acceleration depth for repeated recursions (requires recursions)."""

    def __post_init__(self) -> None:
        """Check combinations.

        Raises:
            SettingsError: Two options that exclude each other, or one that requires another.
        """
        if self.speculate and self.exit_policy is not None:
            raise SettingsError("Early exit changes the output and speculation does not. Use --exit or --speculate.")
        requirements = {
            "threshold": (self.threshold is not None, self.exit_policy, "--exit"),
            "vocabulary": (self.vocabulary is not None, self.exit_policy, "--exit"),
            "residual_scale": (self.residual_scale is not None, self.recursions, "--recursions"),
            "anderson": (self.anderson > 0, self.recursions, "--recursions"),
        }
        for name, (is_given, required, option) in requirements.items():
            if is_given and required is None:
                raise SettingsError(f"--{name.replace('_', '-')} requires {option}. Give both or neither.")
