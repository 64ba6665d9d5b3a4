"""Conversion plan: the source layers of each shared layer, ranks, and sizes before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from recursify import plugins
from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.dense_families import SUPPORTED_FAMILIES, require_convertible
from recursify.checkpoint.dense_names import DenseNames, StoredModule
from recursify.checkpoint.description import kv_bytes_per_token
from recursify.checkpoint.shards import TensorInfo
from recursify.errors import PlanError, UnsupportedModelError
from recursify.modeling import LayerLayout, LayoutError, RecursiveConfig, UnsupportedFamily

from .initialization import find_initialization
from .relaxation import find_relaxation
from .settings import FULL_RANK, ConversionSettings

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

    @classmethod
    def of(cls, config: PreTrainedConfig, tensors: dict[str, TensorInfo], dtype: torch.dtype) -> Size:
        """Size of a model of these tensors, with keys and values in ``dtype``."""
        return cls(
            num_parameters=sum(info.num_parameters for info in tensors.values()),
            num_bytes=sum(info.num_bytes for info in tensors.values()),
            kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        )


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Plan of a conversion; it has no effects until it is carried out.

    Attributes:
        source: Dense model as the user named it.
        config: Config of the recursive model.
        settings: Settings with ``auto`` resolved.
        sources: Positions of the dense layers that initialize each block layer.
        names: Names of the model's parameters, and of the dense model's.
        dense: Size of the dense model, in the dtype of its checkpoint.
        warnings: Warnings for the user.
    """

    source: str
    config: RecursiveConfig
    settings: ConversionSettings
    sources: list[list[int]]
    names: DenseNames
    dense: Size
    warnings: list[str]

    @property
    def layout(self) -> LayerLayout:
        return self.config.layout

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the output in the order on disk."""
        return {name: TensorInfo(shape, self.config.dtype) for name, shape in self.names.parameters.items()}

    @property
    def recursive(self) -> Size:
        """Size of the recursive model, in the dtype written."""
        return Size.of(self.config, self.tensors, self.config.dtype)

    @property
    def has_residuals(self) -> bool:
        return _has_residuals(self.settings)

    @property
    def needs_text(self) -> bool:
        """True if the conversion needs calibration text."""
        return (
            find_initialization(self.settings.initialization).needs_text
            or find_relaxation(self.settings.relaxation).needs_text
            or find_rank_allocation(self.settings.rank_allocation) is not None
        )

    @property
    def corrects_drift(self) -> bool:
        """True if drift correction fits the residuals."""
        fits_residuals = self.has_residuals and find_relaxation(self.settings.relaxation).needs_text
        return self.settings.drift_correction and fits_residuals

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
            "dense": asdict(self.dense),
            "recursive": asdict(self.recursive),
            "warnings": self.warnings,
        }

    def initial_weight(self, checkpoint: DenseCheckpoint, module: StoredModule, generator: torch.Generator) -> Tensor:
        """Shared weight of ``module``, made from the source layers without text."""
        weights = [checkpoint.read(self.names.dense(p, module.path, "weight")) for p in self.sources[module.index]]
        std = getattr(self.config, "initializer_range", 0.02)
        return find_initialization(self.settings.initialization).weight(weights, std, generator)

    def with_rank_pattern(self, pattern: dict[str, int]) -> ConversionPlan:
        """The same plan with other ranks."""
        config = RecursiveConfig(**{**self.config.to_dict(), "lora_rank_pattern": pattern})
        config.dtype = self.config.dtype
        return replace(self, config=config, names=_names(config))

    def __str__(self) -> str:
        layout = self.layout
        rank = "full" if self.settings.lora_rank == FULL_RANK else str(self.settings.lora_rank)
        why_none = " (one recursion)" if layout.num_recursions == 1 else ""
        residual = f"rank {rank}, {self.settings.relaxation}" if self.has_residuals else f"none{why_none}"
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
        for index, sources in enumerate(self.sources):
            lines.append(f"  block {index:<9d} runs at {_span(layout.positions(index))}, from dense {_span(sources)}")
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
    """Plan a conversion; ``has_text`` is the availability of calibration text, on which ``auto`` depends.

    Raises:
        PlanError: The layers do not fold or differ in structure, or a strategy is unknown or needs text.
        UnsupportedModelError: The family cannot be made recursive.
    """
    require_convertible(checkpoint.config)
    layout = _fold(checkpoint.config.num_hidden_layers, settings)
    settings = _resolve(settings, layout, has_text=has_text)
    widest = max(checkpoint.config.hidden_size, getattr(checkpoint.config, "intermediate_size", 0))
    config = RecursiveConfig.from_dense(
        checkpoint.config,
        layout,
        # "full" is stored as the width, which is meaningful to a reader of config.json.
        lora_rank=min(settings.lora_rank, widest),
        lora_rank_pattern={name: min(rank, widest) for name, rank in settings.lora_rank_pattern.items()},
        tie_norms=settings.tie_norms,
    )
    config.dtype = checkpoint.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    return ConversionPlan(
        source=checkpoint.source,
        config=config,
        settings=settings,
        sources=find_initialization(settings.initialization).sources(layout, generator),
        names=_names(config),
        dense=Size.of(checkpoint.config, checkpoint.parameters, checkpoint.dtype),
        warnings=_warnings(config, layout, checkpoint.config.model_type),
    )


def _fold(num_layers: int, settings: ConversionSettings) -> LayerLayout:
    """Fold ``num_layers`` dense layers.

    The default scheme is ``middle_cycle`` (one prelude and one coda layer), the best in MoR's tables 10 and 12; with an
    explicit prelude or coda, it is ``cycle``.
    """
    sharing, ends = settings.sharing, (settings.num_prelude_layers, settings.num_coda_layers)
    is_explicit = ends != (None, None)
    if sharing is None:
        sharing = "cycle" if is_explicit or settings.num_recursions == 1 else "middle_cycle"
    if is_explicit and sharing.startswith("middle_"):
        raise PlanError(
            f"--sharing {sharing} already implies one prelude and one coda layer. Use --sharing "
            f"{sharing.removeprefix('middle_')} with --prelude and --coda, or omit those."
        )
    try:
        return LayerLayout.fold(
            num_layers, settings.num_recursions, sharing, num_prelude_layers=ends[0], num_coda_layers=ends[1]
        )
    except LayoutError as error:
        raise PlanError(str(error)) from error


def find_rank_allocation(name: str) -> RankAllocation | None:
    """Rank allocation called ``name``, None for the same rank everywhere; a PlanError if there is none."""
    return plugins.find("recursify.rank_allocations", name, RANK_ALLOCATIONS, kind="rank allocation", error=PlanError)


def _resolve(settings: ConversionSettings, layout: LayerLayout, *, has_text: bool) -> ConversionSettings:
    """Replace ``auto`` by the strategies that it selects, and ranks by 0 where there is no difference to store."""
    find_rank_allocation(settings.rank_allocation)  # refuses an unknown name, also where no rank is allocated
    initialization, relaxation = settings.initialization, settings.relaxation
    if layout.num_recursions == 1:
        # Each tied group has one layer: the shared weight is that layer, whatever the text, and no residual is left.
        settings = replace(settings, lora_rank=0, lora_rank_pattern={}, rank_allocation="uniform")
        is_fitted = initialization != "auto" and find_initialization(initialization).needs_text
        initialization = "average" if initialization == "auto" or is_fitted else initialization
    has_residuals = _has_residuals(settings)
    if initialization == "auto":
        initialization = "calibrated" if has_text else "average" if has_residuals else "stepwise"
    if relaxation == "auto":
        relaxation = "calibrated" if has_text and initialization == "calibrated" else "svd"
    needs_text = [  # a list, since it looks up every name
        find_initialization(initialization).needs_text,
        find_relaxation(relaxation).needs_text and has_residuals,
        find_rank_allocation(settings.rank_allocation) is not None,
    ]
    if any(needs_text) and not has_text:
        raise PlanError(
            f"initialization '{initialization}', relaxation '{relaxation}' and rank allocation "
            f"'{settings.rank_allocation}' need text to calibrate on. Give --calibration-data, or use "
            f"--init average --relaxation svd --rank-allocation uniform."
        )
    if not has_residuals:
        relaxation = "svd" if relaxation == "calibrated" else relaxation
    return replace(settings, initialization=initialization, relaxation=relaxation)


def _has_residuals(settings: ConversionSettings) -> bool:
    return settings.lora_rank > 0 or any(settings.lora_rank_pattern.values())


def _names(config: RecursiveConfig) -> DenseNames:
    try:
        return DenseNames(config)
    except (UnsupportedFamily, AttributeError) as error:  # a config may compute attributes that RecursiveConfig lacks
        raise UnsupportedModelError(
            f"'{config.dense_model_type}' cannot be made recursive: {str(error).removesuffix('.')}. Supported "
            f"families: {', '.join(SUPPORTED_FAMILIES)}."
        ) from error
    except LayoutError as error:
        raise PlanError(str(error)) from error


def _warnings(config: RecursiveConfig, layout: LayerLayout, family: str) -> list[str]:
    warnings = []
    if family not in SUPPORTED_FAMILIES:
        warnings.append(f"family '{family}' is not a tested one; it is converted because it passes the parity check")
    for property_name, field in (("attention types", "layer_types"), ("RoPE use", "no_rope_layers")):
        kinds = getattr(config, field, None)
        groups = [{kinds[p] for p in layout.positions(index)} if kinds else set() for index in range(layout.block_size)]
        mixed = [index for index, group in enumerate(groups) if len(group) > 1]
        if mixed:
            warnings.append(
                f"block layers {_span(mixed)} tie dense layers of different {property_name}; each position keeps its "
                f"own, so tokens at different depths cannot share an attention call there"
            )
    return warnings
