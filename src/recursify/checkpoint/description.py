"""Description of a recursive checkpoint from its headers: layout, sizes, exits, routers, history."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import PreTrainedConfig

from recursify.modeling import LayerLayout
from recursify.modeling.recursive_routing import capacities_of
from recursify.pictures import save_figure

from .layout_picture import depth_lines, draw_layout, plot_layout
from .loading import read_config, require_recursive
from .record import read_record
from .shards import TensorInfo, folder_tensors


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of a recursive model.

    Attributes:
        stored: Parameters on disk; tied ones count once.
        effective: Parameters of the dense model that computes the same.
        shared: Parameters of the shared linear maps.
        residuals: Parameters of the LoRA factors.
        exits: Parameters of the exit heads.
        routers: Parameters of the routers.
    """

    stored: int
    effective: int
    shared: int
    residuals: int
    exits: int
    routers: int


@dataclass(frozen=True, kw_only=True)
class ExitDescription:
    """Exits of a recursive model.

    Attributes:
        head: Kind of exit head.
        depths: Recursions after which a token can exit.
        through_coda: True if hidden states pass the coda before the exit head.
    """

    head: str
    depths: list[int]
    through_coda: bool


@dataclass(frozen=True, kw_only=True)
class RouterDescription:
    """Routers of a recursive model (Mixture-of-Recursions).

    Attributes:
        router: ``expert_choice`` or ``token_choice``.
        capacities: Fraction of the tokens that each recursion processes; None for token choice.
        thresholds: Score per recursion above which a token is routed at inference; None for the default.
        kv: Keys and values of tokens that are not routed.
        gate: Gate on a routed block's output.
    """

    router: str
    capacities: list[float] | None
    thresholds: list[float] | None
    kv: str
    gate: str


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Facts about a recursive checkpoint.

    Attributes:
        family: ``model_type`` of the dense model.
        layout: Mapping from effective positions to stored layers.
        lora_rank: Rank of the residuals.
        lora_rank_pattern: Ranks that differ, by module path.
        tie_norms: True if one set of norms serves all depths.
        parameters: Number of parameters.
        exits: Exits, if any.
        exit_depth: Recursion after which every token exits; None for full depth.
        routing: Routers, if any.
        num_bytes: Bytes of weights on disk.
        dtype: Dtype of the largest tensor.
        kv_bytes_per_token: Bytes of KV cache per token over all effective layers.
        made_from: Dense model that was converted, if recorded.
        initialization: Initialization of the shared weights, if recorded.
        relaxation: Initialization of the residuals, if recorded.
        calibration: Calibration text and settings, if recorded.
        history: Uptraining runs.
        recursify_version: Version that converted the model, if recorded.
    """

    family: str
    layout: LayerLayout
    lora_rank: int
    lora_rank_pattern: dict[str, int]
    tie_norms: bool
    parameters: ParameterCounts
    exits: ExitDescription | None
    exit_depth: int | None
    routing: RouterDescription | None
    num_bytes: int
    dtype: str
    kv_bytes_per_token: int
    made_from: str | None
    initialization: str | None
    relaxation: str | None
    calibration: dict[str, Any] | None
    history: list[dict[str, Any]]
    recursify_version: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, as ``recursify inspect --json`` prints it."""
        facts, layout = asdict(self), self.layout
        facts["bytes"] = facts.pop("num_bytes")
        facts["layout"] = {
            "effective_layers": layout.num_layers,
            "unique_layers": layout.num_unique_layers,
            "prelude": layout.num_prelude_layers,
            "block_size": layout.block_size,
            "num_recursions": layout.num_recursions,
            "coda": layout.num_coda_layers,
            "order": layout.order,
            "layer_to_block": layout.layer_to_block(),
        }
        return facts

    def layout_text(self) -> str:
        """Draw the layers as text, one line per part."""
        return draw_layout(self.layout)

    def plot(self, file: str | Path) -> None:
        """Draw the layout as a figure (png, svg, pdf).

        Raises:
            SettingsError: matplotlib is not installed, or the format is not supported.
            OutputError: The file cannot be written.
        """
        source = PurePath(self.made_from or "").name
        millions = {name: f"{count / 1e6:,.1f}M" for name, count in asdict(self.parameters).items()}
        residual = f"rank {self.lora_rank}" if self.lora_rank else "no residual"
        if self.lora_rank_pattern:
            residual += f", {len(self.lora_rank_pattern)} modules with their own"
        captions = [
            f"{self.family}, {self.layout}",
            *depth_lines(self.layout, residual, self.exit_depth),
            f"layers: {self.layout.num_unique_layers} stored, {self.layout.num_layers} effective",
            f"parameters: {millions['stored']} stored ({millions['shared']} shared, {millions['residuals']} LoRA), "
            f"{millions['effective']} effective",
        ]
        if self.routing is not None:
            captions.append(f"routers: {self.routing.router}, before each recursion")
        exits = self.exits
        if exits is None and self.exit_depth is not None:
            # Without exit heads, a fixed exit depth uses the model's own head.
            exits = ExitDescription(head="shared", depths=[self.exit_depth], through_coda=True)
        label = ""
        if exits is not None:
            coda = f", {'through' if exits.through_coda else 'past'} the coda" if self.layout.num_coda_layers else ""
            depths = ", ".join(map(str, exits.depths if self.exit_depth is None else [self.exit_depth]))
            label = f"exit after depth {depths}: {exits.head} head{coda}"
        figure = plot_layout(
            self.layout,
            title=f"{source}, recursive" if source else "recursive model",
            captions=captions,
            exits=label,
            through_coda=exits is None or exits.through_coda,
        )
        save_figure(figure, file)


def inspect_model(model: str | Path) -> ModelDescription:
    """Describe the recursive model in a folder; only headers are read.

    Raises:
        CheckpointError: The folder is not a recursive model, or its config or a shard is damaged.
    """
    folder = require_recursive(model)
    record = read_record(folder)
    config = read_config(folder)
    tensors = folder_tensors(folder)
    dtype = max(tensors.values(), key=lambda info: info.num_bytes).dtype
    plan = record.get("plan", {})
    configured = ("layout", "lora_rank", "lora_rank_pattern", "tie_norms", "exit_depth")
    exits = routing = None
    if config.exit_head is not None:
        exits = ExitDescription(
            head=config.exit_head, depths=list(config.exit_depths), through_coda=config.exit_through_coda
        )
    if config.router is not None:
        routing = RouterDescription(
            router=config.router,
            capacities=capacities_of(config) if config.router == "expert_choice" else None,
            thresholds=config.router_thresholds,
            kv=config.router_kv,
            gate=config.router_gate,
        )
    return ModelDescription(
        family=config.dense_model_type,
        **{name: getattr(config, name) for name in configured},
        parameters=_count_parameters(tensors, config.layout.num_recursions),
        exits=exits,
        routing=routing,
        num_bytes=sum(info.num_bytes for info in tensors.values()),
        dtype=str(dtype).removeprefix("torch."),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        made_from=plan.get("source"),
        initialization=plan.get("initialization"),
        relaxation=plan.get("relaxation"),
        calibration=record.get("calibration") or None,
        history=record.get("history", []),
        recursify_version=record.get("recursify_version"),
    )


def _count_parameters(tensors: dict[str, TensorInfo], num_recursions: int) -> ParameterCounts:
    counts = {name: info.num_parameters for name, info in tensors.items()}

    def total(pattern: str) -> int:
        return sum(count for name, count in counts.items() if re.search(pattern, name))

    parts = {
        "shared": total(r"^model\.block\..*\.linear\.weight$"),
        "residuals": total(r"^model\.block\..*\.lora_"),
        "exits": total(r"^exit_heads\."),
        "routers": total(r"routers\."),
    }
    stored = total("")
    effective = stored + num_recursions * parts["shared"] - sum(parts.values())
    return ParameterCounts(stored=stored, effective=effective, **parts)


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all effective layers."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * num_heads * head_dim * dtype.itemsize
