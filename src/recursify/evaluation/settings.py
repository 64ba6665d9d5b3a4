"""Settings of evaluations, a calibration of exits, and a generation: options of their commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, NonNegativeInt, PositiveInt

from recursify.errors import SettingsError
from recursify.settings import ExitOptions, Option, SamplingOptions, Settings, Strings


def _read_depths(value: Any) -> Any:
    depths = value if isinstance(value, list | tuple) else [value]
    return [None if depth == "all" else depth for depth in depths]


Depth = Annotated[NonNegativeInt, "a depth (0, 1, ...) or 'all'"] | None
"""Recursion after which tokens exit; None, or ``all`` in text, is full depth."""


class RecursionSettings(Settings):
    """Number of recursions, where it differs from the model's own."""

    recursions: Annotated[PositiveInt | None, Option("--recursions", "-r")] = None
    """Number of times to apply the shared block. Without it, as converted."""
    residual_scale: float | None = None
    """Factor of each shared layer's update (requires recursions). Without it, the model's own number of recursions
    divided by the new one."""
    anderson: NonNegativeInt = 0
    """Anderson acceleration depth for repeated recursions (requires recursions)."""

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments of :func:`~recursify.checkpoint.loading.load_model`."""
        return {name: getattr(self, name) for name in ("recursions", "residual_scale", "anderson")}

    def __post_init__(self) -> None:
        if self.recursions is None and (self.residual_scale is not None or self.anderson):
            name = "--anderson" if self.anderson else "--residual-scale"
            raise SettingsError(f"{name} requires --recursions. Give both or neither.")


class EvaluationSettings(RecursionSettings):
    """Options of ``recursify perplexity``."""

    panels: ClassVar[Mapping[str, str]] = {"recursions": "Recursions", "data": "Text"}

    data: Strings | None = None
    """Text (txt, md, jsonl, json, csv, tsv, parquet, or a folder). Without it, the part of Python's help topics that
    calibration does not use."""
    length: Annotated[int, Ge(2)] = 512
    """Tokens per window."""
    max_tokens: Annotated[int, Ge(2)] | None = None
    """Maximum number of tokens. Without it, the whole text."""
    depth: NonNegativeInt | None = None
    """Depth at which every token exits; 0 is the first recursion. Without it, full depth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and self.recursions is not None:
            raise SettingsError("--depth is one of the model's own recursions. Use either --depth or --recursions.")


class TaskSettings(Settings):
    """Options of ``recursify eval``."""

    depths: Annotated[tuple[Depth, ...], BeforeValidator(_read_depths), Option("--depth", metavar="<int>|all")] = ()
    """Depth at which every token exits; 0 is the first recursion, all is full depth. Without it, full depth."""
    include_path: Path | None = None
    """Folder with further task files (YAML)."""
    num_fewshot: NonNegativeInt | None = None
    """Number of solved examples in the prompt. Without it, the task's own."""
    limit: PositiveInt | None = None
    """Maximum number of samples per task."""
    batch_size: PositiveInt = 8
    """Sequences per batch."""
    control: bool = True
    """Score the dense model that was converted, too."""
    save: bool = True
    """Store the scores in recursify.json."""


class ExitCalibrationSettings(Settings):
    """Options of ``recursify calibrate-exits``."""

    policy: str = "head"
    """Exit policy: head, confidence, entropy, saturation, convergence or divergence."""
    target_agreement: Annotated[float, Gt(0), Lt(1)] = 0.95
    """Target agreement: fraction of tokens whose exit prediction matches the full model."""
    data: Strings | None = None
    """Text (txt, md, jsonl, json, csv, tsv, parquet, or a folder). Without it, the part of Python's help topics that
    calibration does not use."""
    vocabulary: PositiveInt | None = None
    """Number of vocabulary entries to score, the first (most frequent) ones. Without it, all."""
    length: Annotated[int, Ge(2)] = 256
    """Tokens per window."""
    max_tokens: Annotated[int, Ge(2)] = 16384
    """Maximum number of tokens."""


class GenerationSettings(RecursionSettings, ExitOptions, SamplingOptions):
    """Options of ``recursify generate``."""

    panels: ClassVar[Mapping[str, str]] = {
        "recursions": "Recursions",
        "max_new_tokens": "Generation",
        "temperature": "Generation",
        "exit_policy": "Early exit",
        "vocabulary": "Early exit",
        "speculate": "Speculation",
    }

    max_new_tokens: PositiveInt | None = None
    """Maximum number of new tokens. Without it, the model's own, else 64."""
    chat: bool = False
    """Apply the model's chat template to the prompt."""
    measure: Annotated[bool, Option("--stats")] = False
    """Report tokens per second; with early exit or speculation also their statistics, and the speed of plain
    decoding."""

    vocabulary: PositiveInt | None = None
    """Score only the first N vocabulary entries. Without it, as calibrated."""
    kv: str | None = None
    """KV cache of skipped depths: deferred (exact), copied or latest. Without it, the model's own."""
    max_pending: PositiveInt = 64
    """Maximum number of tokens that wait for their deferred depths."""

    speculate: bool = False
    """Draft with the first recursion and verify with the full model: the same output, in fewer calls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speculate and self.exit_policy is not None:
            raise SettingsError("Early exit changes the output and speculation does not. Use --exit or --speculate.")
        for name in ("threshold", "vocabulary"):
            if getattr(self, name) is not None and self.exit_policy is None:
                raise SettingsError(f"--{name} requires --exit. Give both or neither.")
