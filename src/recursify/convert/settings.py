"""Settings of a conversion: options of ``recursify convert`` and keywords of ``convert_model``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, NonNegativeInt, PositiveInt

from recursify.errors import SettingsError
from recursify.settings import Dtype, Option, Settings, Strings

FULL_RANK = 2**31 - 1
"""Rank of ``lora_rank: full``: clamped to each matrix, so that every residual is stored whole."""


def _full_rank(value: Any) -> Any:
    return FULL_RANK if value == "full" else value


def _no_data(value: Any) -> Any:
    return () if value in ("none", ["none"], ("none",)) else value


Rank = Annotated[int, Ge(0), BeforeValidator(_full_rank), "a whole number of at least 0, or 'full'"]


class ConversionSettings(Settings):
    """Options of ``recursify convert``."""

    panels: ClassVar[Mapping[str, str]] = {
        "num_recursions": "Layout",
        "initialization": "Weights",
        "calibration_data": "Calibration",
    }

    num_recursions: Annotated[PositiveInt, Option("--recursions", "-r")] = 2
    """Number of times to apply the shared block."""
    sharing: Literal["cycle", "sequence", "middle_cycle", "middle_sequence"] | None = None
    """Sharing scheme. Without it, middle_cycle, or cycle if a prelude or coda is given."""
    num_prelude_layers: Annotated[NonNegativeInt | None, Option("--prelude")] = None
    """Number of unshared layers before the block. Without it, the sharing scheme's own number."""
    num_coda_layers: Annotated[NonNegativeInt | None, Option("--coda")] = None
    """Number of unshared layers after the block. Without it, the sharing scheme's own number."""

    target_size: Annotated[float, Gt(0), Lt(1)] | None = None
    """Budget of stored parameters as a fraction of the dense model's, for which prelude, coda, recursions, order and
    ranks are chosen (recursify plan shows the choice)."""
    target_parameters: PositiveInt | None = None
    """The same budget as a number of parameters."""

    initialization: Annotated[str, Option("--init")] = "auto"
    """Initialization of the shared weights: calibrated, average, stepwise, lower, upper, random_choice, random or
    fisher. auto: calibrated with text, else average (stepwise for rank 0)."""
    lora_rank: Rank = 64
    """Rank of each depth's residual, clamped to the matrix; 0 for none, full for all of it."""
    lora_rank_pattern: dict[str, Rank] = field(default_factory=dict)
    """Ranks that differ, by module path, for example mlp.down_proj=128 or 3.self_attn.q_proj=32."""
    relaxation: str = "auto"
    """Initialization of the residuals: calibrated, svd or zero. auto: calibrated with text, else svd."""
    rank_allocation: str = "uniform"
    """Distribution of the rank over matrices: uniform; tail or fisher, the same number of parameters where they remove
    the most error (by singular values weighted with the inputs, or with curvature)."""
    tie_norms: bool = False
    """Use one norm and bias for all depths, as in the papers, instead of one per depth."""
    dtype: Dtype = "auto"
    """Dtype of the written weights; auto keeps the dense model's."""
    seed: int = 0
    """Seed of random initializations."""

    calibration_data: Annotated[Strings | None, BeforeValidator(_no_data)] = None
    """Text to calibrate on (txt, md, jsonl, json, csv, tsv, parquet, or a folder), or none. Without it, Python's own
    help topics."""
    calibration_tokens: PositiveInt = 8192
    """Number of calibration tokens."""
    calibration_length: Annotated[int, Ge(2)] = 512
    """Tokens per calibration sequence."""
    device: str = "cpu"
    """Device of the calibration: the layers that it runs, and the algebra on their weights."""
    drift_correction: bool = True
    """Refit every residual on the inputs that the converted model produces (calibrated relaxation only)."""

    @property
    def has_budget(self) -> bool:
        """True if the layout is to be chosen for a number of parameters."""
        return self.target_size is not None or self.target_parameters is not None

    def __post_init__(self) -> None:
        if not self.has_budget:
            return
        if self.target_size is not None and self.target_parameters is not None:
            raise SettingsError("target_size and target_parameters are two budgets. Give one of them.")
        chosen = ("sharing", "num_prelude_layers", "num_coda_layers", "lora_rank_pattern")
        if given := [name for name in chosen if getattr(self, name)]:
            raise SettingsError(f"A target size chooses the layout and its ranks. Leave out {', '.join(given)}.")
