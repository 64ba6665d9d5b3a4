"""A conversion as printable data: which dense layer feeds which shared layer, ranks, sizes before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, TensorInfo
from recursify.checkpoint.description import kv_bytes_per_token
from recursify.errors import PlanError, UnsupportedModelError
from recursify.modeling import LayerLayout, LayoutError, RecursiveConfig, RecursiveForCausalLM, UnsupportedFamily

from .initialization import find_initialization
from .relaxation import find_relaxation
from .settings import FULL_RANK, ConversionSettings
from .sharing import fold_layers

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
"""Families whose parity is tested in this project, by transformers' ``model_type``."""

REFUSED_FAMILIES = {
    "gemma3n_text": "its layers share keys and values across depth and read per-layer embeddings",
    "gemma4_text": "its layers share keys and values across depth and read per-layer embeddings",
    "gemma3": "it is multimodal; convert its text model (model_type gemma3_text)",
    "gemma4": "it is multimodal, and its text layers share keys and values across depth",
    "gpt2": "its weights are Conv1D and its positions are learned; shared layers are made of nn.Linear",
}
"""Families known not to fit, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is.

    Attributes:
        num_parameters: Stored parameters; tied ones count once.
        num_bytes: Their bytes on disk.
        kv_bytes_per_token: Keys and values of one token over all *effective* layers, in the model's dtype.
    """

    num_parameters: int
    num_bytes: int
    kv_bytes_per_token: int

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Everything a conversion will do, decided before it starts.

    Attributes:
        source: What the user typed as the model.
        config: Config of the recursive model.
        settings: The settings, ``auto`` resolved.
        sources: For each block layer, the dense layers that feed its shared weights.
        tensors: Every tensor of the output, with shape and dtype, in the order on disk.
        dense: Size of the dense model, in the dtype of its checkpoint.
        recursive: Size of the recursive one, in the dtype written.
        warnings: What the user should know.
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
        """Whether statistics of the dense model's activations are needed."""
        return (
            find_initialization(self.settings.initialization).needs_text
            or find_relaxation(self.settings.relaxation).needs_text
            or self.settings.rank_allocation != "uniform"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
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
        """The same plan with other ranks, its tensors and sizes counted anew."""
        fields = self.config.to_dict()
        config = RecursiveConfig(**{**fields, "lora_rank_pattern": pattern})
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


def _span(positions) -> str:
    positions = list(positions)
    if len(positions) > 2 and positions == list(range(positions[0], positions[-1] + 1)):
        return f"{positions[0]}-{positions[-1]}"
    return ", ".join(map(str, positions))


def make_plan(checkpoint: DenseCheckpoint, settings: ConversionSettings, *, has_text: bool) -> ConversionPlan:
    """Decide a conversion.

    Args:
        checkpoint: The dense model.
        settings: What the user decided.
        has_text: Whether there is text to calibrate on, which is what ``auto`` turns on.

    Raises:
        PlanError: The depth does not fold, a strategy is unknown or needs text that is not there.
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


def _resolve(settings: ConversionSettings, layout: LayerLayout, *, has_text: bool) -> ConversionSettings:
    """Replace ``auto`` by what it stands for here."""
    has_residuals = settings.lora_rank > 0 or any(settings.lora_rank_pattern.values())
    initialization, relaxation = settings.initialization, settings.relaxation
    if layout.num_recursions == 1:
        # One layer per slot: the shared weight is that layer, and there is no residual to fit.
        initialization = "average" if initialization == "auto" else initialization
        relaxation = "svd" if relaxation == "auto" else relaxation
    if initialization == "auto":
        initialization = "calibrated" if has_text else "average" if has_residuals else "stepwise"
    if relaxation == "auto":
        relaxation = "calibrated" if has_text and initialization == "calibrated" else "svd"
    needs_text = find_initialization(initialization).needs_text or (
        has_residuals and find_relaxation(relaxation).needs_text
    )
    if (needs_text or settings.rank_allocation != "uniform") and not has_text:
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
        # "full" is stored as a rank that means something to a reader of config.json
        lora_rank=min(settings.lora_rank, widest),
        lora_rank_pattern={name: min(rank, widest) for name, rank in settings.lora_rank_pattern.items()},
        tie_norms=settings.tie_norms,
    )


def recursive_tensors(config: RecursiveConfig, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Every parameter of the recursive model, from the model itself, built without memory.

    Raises:
        UnsupportedModelError: The family's layers cannot be shared.
        PlanError: The layers to be tied are unlike.
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
    found = []
    if family not in SUPPORTED_FAMILIES:
        found.append(f"family '{family}' is not among those tested; it is converted because it passes the parity check")
    varying = {
        "attention types": getattr(config, "layer_types", None),
        "RoPE use": getattr(config, "no_rope_layers", None),
    }
    for what, kinds in varying.items():
        unlike = [
            index
            for index in range(layout.block_size)
            if kinds and len({kinds[position] for position in layout.positions(index)}) > 1
        ]
        if unlike:
            found.append(
                f"block layers {_span(unlike)} tie dense layers of different {what}; each position keeps its own, but "
                f"depths cannot share one attention call there"
            )
    return found
