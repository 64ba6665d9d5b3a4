"""What a user may decide about a conversion, read strictly."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from recursify.errors import SettingsError
from recursify.settings import check_keys

FULL_RANK = 2**31 - 1
"""``--lora-rank full``: clamped to each matrix, so that every residual is stored whole."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """Options of ``recursify convert``; a YAML file given with ``--config`` has the same names."""

    num_recursions: int = 2
    """How often the shared block is applied."""
    sharing: str | None = None
    """One of ``SHARINGS``; None is ``middle_cycle``, or ``cycle`` with a prelude or coda given."""
    num_prelude_layers: int | None = None
    """Unshared layers before the block; None takes the scheme's own."""
    num_coda_layers: int | None = None
    """Unshared layers after the block; None takes the scheme's own."""
    initialization: str = "auto"
    """How shared weights come to be; ``auto``: ``calibrated`` with text, else ``average`` (``stepwise`` for rank 0)."""
    relaxation: str = "auto"
    """How the residuals come to be; ``auto`` is ``calibrated`` with text, else ``svd``."""
    lora_rank: int = 64
    """Rank of every residual, clamped to the matrix; 0 for none."""
    lora_rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ, by module path: ``{mlp.down_proj: 128, "3.self_attn.q_proj": 32}``."""
    rank_allocation: Literal["uniform", "tail", "fisher"] = "uniform"
    """``tail`` spends the same parameters where the singular values, weighted by the inputs, are largest; ``fisher``
    where those weighted by curvature are."""
    tie_norms: bool = False
    """One norm and bias for all depths, as in the papers, instead of one per depth."""
    dtype: str = "auto"
    """Dtype on disk; ``auto`` keeps the dense model's."""
    seed: int = 0
    """Seed of ``random``, ``random_choice`` and zero-initialized LoRA."""
    calibration_data: tuple[str, ...] | None = None
    """Text files (txt, md, jsonl, parquet); None takes the text in Python's own ``pydoc_data``; empty for none."""
    calibration_tokens: int = 16384
    """How much of the text is used, in tokens."""
    calibration_length: int = 512
    """Length of the sequences the text is cut into, in tokens."""
    device: str = "cpu"
    """Where dense layers run during calibration; the algebra stays on the CPU, in float64."""
    drift_correction: bool = True
    """Refit every residual on the inputs it will really see (calibrated relaxation only)."""

    def __post_init__(self) -> None:
        if self.num_recursions < 1:
            raise SettingsError(f"--recursions must be at least 1, got {self.num_recursions}.")
        ranks = {"lora_rank": self.lora_rank, **self.lora_rank_pattern}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or rank < 0:
                raise SettingsError(f"The rank of {name} must be a whole number of at least 0, or 'full'; got {rank}.")
        if self.dtype not in DTYPES:
            raise SettingsError(f"Unknown dtype '{self.dtype}'. Use one of: {', '.join(DTYPES)}.")
        if self.rank_allocation not in ("uniform", "tail", "fisher"):
            raise SettingsError(f"Unknown rank allocation '{self.rank_allocation}'. Use uniform, tail or fisher.")
        if self.calibration_tokens < 1 or self.calibration_length < 2:
            raise SettingsError(
                f"Calibration needs at least 1 token in sequences of at least 2, got {self.calibration_tokens} and "
                f"{self.calibration_length}."
            )

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], where: str) -> ConversionSettings:
        """Settings from a mapping read from ``where``.

        Raises:
            SettingsError: An unknown key (the nearest is named) or a value out of range.
        """
        check_keys(mapping, [entry.name for entry in fields(cls)], where)
        values = dict(mapping)
        if "lora_rank" in values:
            values["lora_rank"] = parse_rank(values["lora_rank"])
        if "lora_rank_pattern" in values:
            values["lora_rank_pattern"] = {k: parse_rank(v) for k, v in (values["lora_rank_pattern"] or {}).items()}
        if values.get("calibration_data") is not None:
            data = values["calibration_data"]
            values["calibration_data"] = (data,) if isinstance(data, str) else tuple(data)
        return cls(**values)


def parse_rank(value: Any) -> int:
    """A rank as typed: a whole number, or ``full``.

    Raises:
        SettingsError: Anything else.
    """
    if str(value) == "full":
        return FULL_RANK
    try:
        rank = int(str(value))
    except ValueError:
        rank = -1
    if rank < 0:
        raise SettingsError(f"A LoRA rank is a whole number of at least 0, or 'full'; got '{value}'.")
    return rank
