"""Conversion plan: the source layers of each shared layer, ranks, and sizes before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from recursify import plugins
from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.description import kv_bytes_per_token
from recursify.checkpoint.shards import TensorInfo
from recursify.errors import PlanError, UnsupportedModelError
from recursify.modeling import LayerLayout, LayoutError, RecursiveConfig, RecursiveForCausalLM, UnsupportedFamily

from .initialization import find_initialization
from .relaxation import find_relaxation
from .settings import FULL_RANK, ConversionSettings

SUPPORTED_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "phi3",
    "gpt_neox",
)
"""``model_type`` of the families whose parity is tested in this project."""

REFUSED_FAMILIES = {
    "gemma3n_text": "its layers share keys and values and read per-layer embeddings",
    "gemma4_text": "its layers share keys and values and read per-layer embeddings",
    "gemma3": "it is multimodal; convert its text model (model_type gemma3_text)",
    "gemma4": "it is multimodal, and its text layers share keys and values",
    "gpt2": "its weights are Conv1D and its positions are learned, but shared layers need nn.Linear",
}
"""Unsupported families with the reason."""

RankAllocation = Callable[[Any], dict[str, int]]
"""Function from a :class:`~recursify.convert.calibration.Calibration` to ranks by module (``3.mlp.down_proj``)."""

RANK_ALLOCATIONS: dict[str, RankAllocation | None] = {"uniform": None}
"""Built-in rank allocations; others are entry points of the group ``recursify.rank_allocations``."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a model.

    Attributes:
        num_parameters: Stored parameters; tied ones count once.
        num_bytes: Bytes on disk.
        kv_bytes_per_token: Bytes of KV cache per token over all *effective* layers, in the model's dtype.
    """

    num_parameters: int
    num_bytes: int
    kv_bytes_per_token: int

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Plan of a conversion; it has no effects until it is carried out.

    Attributes:
        source: Dense model as the user named it.
        config: Config of the recursive model.
        settings: Settings with ``auto`` resolved.
        sources: Positions of the dense layers that initialize each block layer.
        tensors: Tensors of the output in the order on disk.
        dense: Size of the dense model, in the dtype of its checkpoint.
        recursive: Size of the recursive model, in the dtype written.
        warnings: Warnings for the user.
    """

    source: str
    config: RecursiveConfig
    settings: ConversionSettings
    sources: list[list[int]]
    tensors: dict[str, TensorInfo]
    dense: Size
    recursive: Size
    warnings: list[str]

    @property
    def layout(self) -> LayerLayout:
        return self.config.layout

    @property
    def needs_text(self) -> bool:
        """True if the conversion needs calibration text."""
        return (
            find_initialization(self.settings.initialization).needs_text
            or find_relaxation(self.settings.relaxation).needs_text
            or find_rank_allocation(self.settings.rank_allocation) is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, as ``recursify convert --dry-run --json`` prints it."""
        layout = self.layout
        return {
            "source": self.source,
            "family": self.config.dense_model_type,
            "layout": {
                "prelude": list(range(layout.num_prelude_layers)),
                "block": [
                    {"layer": index, "positions": layout.positions(index), "initialized_from": self.sources[index]}
                    for index in range(layout.block_size)
                ],
                "coda": list(layout.coda_positions),
                "num_recursions": layout.num_recursions,
                "order": layout.order,
            },
            "initialization": self.settings.initialization,
            "relaxation": self.settings.relaxation if self.has_residuals else None,
            "lora_rank": "full" if self.settings.lora_rank == FULL_RANK else self.settings.lora_rank,
            "lora_rank_pattern": self.config.lora_rank_pattern,
            "rank_allocation": self.settings.rank_allocation,
            "tie_norms": self.settings.tie_norms,
            "dtype": self.settings.dtype,
            "dense": self.dense.to_dict(),
            "recursive": self.recursive.to_dict(),
            "warnings": self.warnings,
        }

    @property
    def has_residuals(self) -> bool:
        return self.settings.lora_rank > 0 or any(self.settings.lora_rank_pattern.values())

    def with_rank_pattern(self, pattern: dict[str, int]) -> ConversionPlan:
        """The same plan with other ranks, and the tensors and sizes that follow."""
        config = RecursiveConfig(**{**self.config.to_dict(), "lora_rank_pattern": pattern})
        tensors = recursive_tensors(config, next(iter(self.tensors.values())).dtype)
        return replace(self, config=config, tensors=tensors, recursive=_size(config, tensors))

    def __str__(self) -> str:
        layout = self.layout
        rank = "full" if self.settings.lora_rank == FULL_RANK else str(self.settings.lora_rank)
        residual = f"rank {rank}, {self.settings.relaxation}" if self.has_residuals else "none"
        dense, recursive = self.dense, self.recursive
        lines = [
            f"{self.source} ({self.config.dense_model_type}, {layout.num_layers} layers) -> {layout}",
            f"  shared weights  {self.settings.initialization}",
            f"  LoRA            {residual}",
            f"  norms           {'tied' if self.settings.tie_norms else 'one per depth'}",
            f"  parameters      {dense.num_parameters / 1e6:,.1f}M -> {recursive.num_parameters / 1e6:,.1f}M",
            f"  bytes on disk   {dense.num_bytes / 1e6:,.1f} MB -> {recursive.num_bytes / 1e6:,.1f} MB",
            f"  KV per token    {dense.kv_bytes_per_token:,} B -> {recursive.kv_bytes_per_token:,} B "
            f"(every effective layer keeps its own)",
        ]
        if layout.num_prelude_layers:
            lines.append(f"  prelude         dense {_span(range(layout.num_prelude_layers))}")
        for index in range(layout.block_size):
            lines.append(
                f"  block {index:<9d} runs at {_span(layout.positions(index))}, from dense {_span(self.sources[index])}"
            )
        if layout.num_coda_layers:
            lines.append(f"  coda            dense {_span(layout.coda_positions)}")
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


def _span(positions: Iterable[int]) -> str:
    """Positions as ``4-14`` where contiguous, else separated by commas."""
    positions = list(positions)
    if len(positions) > 2 and positions == list(range(positions[0], positions[-1] + 1)):
        return f"{positions[0]}-{positions[-1]}"
    return ", ".join(map(str, positions))


def make_plan(checkpoint: DenseCheckpoint, settings: ConversionSettings, *, has_text: bool) -> ConversionPlan:
    """Plan a conversion.

    Args:
        checkpoint: Dense model.
        settings: Settings of the user.
        has_text: Availability of calibration text, on which ``auto`` depends.

    Raises:
        PlanError: The layers do not fold, or a strategy is unknown or needs text.
        UnsupportedModelError: The family cannot be made recursive.
    """
    family = checkpoint.config.model_type
    if family in REFUSED_FAMILIES:
        raise UnsupportedModelError(
            f"'{family}' cannot be made recursive: {REFUSED_FAMILIES[family]}. "
            f"Supported families: {', '.join(SUPPORTED_FAMILIES)}."
        )
    layout = fold_layers(
        checkpoint.config.num_hidden_layers,
        settings.num_recursions,
        settings.sharing,
        num_prelude_layers=settings.num_prelude_layers,
        num_coda_layers=settings.num_coda_layers,
    )
    settings = _resolve(settings, layout, has_text=has_text)
    config = _recursive_config(checkpoint.config, layout, settings)
    dtype = checkpoint.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    config.dtype = dtype
    tensors = recursive_tensors(config, dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    dense_kv = kv_bytes_per_token(checkpoint.config, checkpoint.dtype)
    return ConversionPlan(
        source=checkpoint.source,
        config=config,
        settings=settings,
        sources=find_initialization(settings.initialization).sources(layout, generator),
        tensors=tensors,
        dense=Size(
            num_parameters=checkpoint.num_parameters, num_bytes=checkpoint.num_bytes, kv_bytes_per_token=dense_kv
        ),
        recursive=_size(config, tensors),
        warnings=_warnings(config, layout, family),
    )


def fold_layers(
    num_layers: int,
    num_recursions: int,
    sharing: str | None = None,
    *,
    num_prelude_layers: int | None = None,
    num_coda_layers: int | None = None,
) -> LayerLayout:
    """Fold ``num_layers`` dense layers into a layout.

    The default scheme is ``middle_cycle`` (one prelude and one coda layer), the best in MoR's tables 10 and 12; with an
    explicit prelude or coda, it is ``cycle``.

    Raises:
        PlanError: The layers do not divide (the message lists the nearest folds), or the scheme is unknown.
    """
    is_explicit = num_prelude_layers is not None or num_coda_layers is not None
    if sharing is None:
        sharing = "cycle" if is_explicit or num_recursions == 1 else "middle_cycle"
    if is_explicit and sharing.startswith("middle_"):
        raise PlanError(
            f"--sharing {sharing} already implies one prelude and one coda layer. Use --sharing "
            f"{sharing.removeprefix('middle_')} with --prelude and --coda, or omit those."
        )
    try:
        return LayerLayout.fold(
            num_layers,
            num_recursions,
            sharing,
            num_prelude_layers=num_prelude_layers,
            num_coda_layers=num_coda_layers,
        )
    except LayoutError as error:
        raise PlanError(str(error)) from error


def find_rank_allocation(name: str) -> RankAllocation | None:
    """Look up a rank allocation; None is the same rank everywhere.

    Raises:
        PlanError: The name is unknown.
    """
    return plugins.find("recursify.rank_allocations", name, RANK_ALLOCATIONS, kind="rank allocation", error=PlanError)


def _resolve(settings: ConversionSettings, layout: LayerLayout, *, has_text: bool) -> ConversionSettings:
    """Replace ``auto`` by the strategies that it selects."""
    allocates_ranks = find_rank_allocation(settings.rank_allocation) is not None
    has_residuals = settings.lora_rank > 0 or any(settings.lora_rank_pattern.values())
    initialization, relaxation = settings.initialization, settings.relaxation
    if layout.num_recursions == 1:
        # Each tied group has one layer: the shared weight is that layer, and there is no residual to fit.
        initialization = "average" if initialization == "auto" else initialization
        relaxation = "svd" if relaxation == "auto" else relaxation
    if initialization == "auto":
        initialization = "calibrated" if has_text else "average" if has_residuals else "stepwise"
    if relaxation == "auto":
        relaxation = "calibrated" if has_text and initialization == "calibrated" else "svd"
    needs_text = find_initialization(initialization).needs_text or (
        has_residuals and find_relaxation(relaxation).needs_text
    )
    if (needs_text or allocates_ranks) and not has_text:
        raise PlanError(
            f"initialization '{initialization}', relaxation '{relaxation}' and rank allocation "
            f"'{settings.rank_allocation}' need text to calibrate on. Give --calibration-data, or use "
            f"--init average --relaxation svd --rank-allocation uniform."
        )
    if not has_residuals:
        relaxation = "svd" if relaxation == "calibrated" else relaxation
    return replace(settings, initialization=initialization, relaxation=relaxation)


def _recursive_config(dense: PreTrainedConfig, layout: LayerLayout, settings: ConversionSettings) -> RecursiveConfig:
    widest = max(dense.hidden_size, getattr(dense, "intermediate_size", dense.hidden_size))
    return RecursiveConfig.from_dense(
        dense,
        layout,
        # "full" is stored as the width, which is meaningful to a reader of config.json.
        lora_rank=min(settings.lora_rank, widest),
        lora_rank_pattern={name: min(rank, widest) for name, rank in settings.lora_rank_pattern.items()},
        tie_norms=settings.tie_norms,
    )


def recursive_tensors(config: RecursiveConfig, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Parameters of the recursive model, from the model on the meta device.

    Raises:
        UnsupportedModelError: The family's layers cannot be shared.
        PlanError: The layers of a tied group differ in structure.
    """
    try:
        with torch.device("meta"):
            model = RecursiveForCausalLM(config)
    except UnsupportedFamily as error:
        raise UnsupportedModelError(
            f"'{config.dense_model_type}' cannot be made recursive: {error} Supported families: "
            f"{', '.join(SUPPORTED_FAMILIES)}."
        ) from error
    except LayoutError as error:
        raise PlanError(str(error)) from error
    return {name: TensorInfo(tuple(parameter.shape), dtype) for name, parameter in model.named_parameters()}


def _size(config: RecursiveConfig, tensors: dict[str, TensorInfo]) -> Size:
    dtype = next(iter(tensors.values())).dtype
    return Size(
        num_parameters=sum(info.num_parameters for info in tensors.values()),
        num_bytes=sum(info.num_bytes for info in tensors.values()),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
    )


def _warnings(config: RecursiveConfig, layout: LayerLayout, family: str) -> list[str]:
    warnings = []
    if family not in SUPPORTED_FAMILIES:
        warnings.append(f"family '{family}' is not a tested one; it is converted because it passes the parity check")
    varying = {
        "attention types": getattr(config, "layer_types", None),
        "RoPE use": getattr(config, "no_rope_layers", None),
    }
    for property_name, kinds in varying.items():
        mixed = [
            index
            for index in range(layout.block_size)
            if kinds and len({kinds[position] for position in layout.positions(index)}) > 1
        ]
        if mixed:
            warnings.append(
                f"block layers {_span(mixed)} tie dense layers of different {property_name}; each position keeps its "
                f"own, so tokens at different depths cannot share an attention call there"
            )
    return warnings
