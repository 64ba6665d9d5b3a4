"""What a recursive checkpoint is, read from its headers: layout, sizes, history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from recursify.errors import CheckpointError
from recursify.modeling import RecursiveConfig
from recursify.modeling.recursive_routing import capacities_of

from .dense_checkpoint import folder_tensors


def describe(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A recursive folder as JSON-ready data; no weight is read.

    Raises:
        CheckpointError: The config or a shard is damaged.
    """
    try:
        config = RecursiveConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"'{folder}' has a config that does not load: {error}") from error
    tensors = folder_tensors(folder)
    layout = config.layout
    stored = sum(info.num_parameters for info in tensors.values())
    block = {name: info for name, info in tensors.items() if name.startswith("model.block.")}
    once = sum(info.num_parameters for name, info in block.items() if name.endswith(".linear.weight"))
    residuals = sum(info.num_parameters for name, info in block.items() if ".lora_" in name)
    exits = sum(info.num_parameters for name, info in tensors.items() if name.startswith("exit_heads."))
    routers = sum(info.num_parameters for name, info in tensors.items() if "routers." in name)
    dtype = max(tensors.values(), key=lambda info: info.num_bytes).dtype
    return {
        "family": config.dense_model_type,
        "layout": {
            "effective_layers": layout.num_layers,
            "unique_layers": layout.num_unique_layers,
            "prelude": layout.num_prelude_layers,
            "block_size": layout.block_size,
            "num_recursions": layout.num_recursions,
            "coda": layout.num_coda_layers,
            "order": layout.order,
            "layer_to_block": layout.layer_to_block(),
        },
        "lora_rank": config.lora_rank,
        "lora_rank_pattern": config.lora_rank_pattern,
        "tie_norms": config.tie_norms,
        "parameters": {
            "stored": stored,
            "effective": stored + (layout.num_recursions - 1) * once - residuals - exits - routers,
            "shared": once,
            "residuals": residuals,
            "exits": exits,
            "routers": routers,
        },
        "exits": None
        if config.exit_head is None
        else {
            "head": config.exit_head,
            "depths": list(config.exit_depths),
            "through_coda": config.exit_through_coda,
        },
        "exit_depth": config.exit_depth,
        "routing": None
        if config.router is None
        else {
            "router": config.router,
            "capacities": capacities_of(config) if config.router == "expert_choice" else None,
            "thresholds": config.router_thresholds,
            "kv": config.router_kv,
            "gate": config.router_gate,
        },
        "bytes": sum(info.num_bytes for info in tensors.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
        "made_from": record.get("plan", {}).get("source"),
        "initialization": record.get("plan", {}).get("initialization"),
        "relaxation": record.get("plan", {}).get("relaxation"),
        "calibration": record.get("calibration") or None,
        "history": record.get("history", []),
        "recursify_version": record.get("recursify_version"),
    }


def draw_layout(description: dict[str, Any]) -> str:
    """The layers as text, one line per part."""
    layout = description["layout"]
    first, last = layout["prelude"], layout["effective_layers"] - layout["coda"]
    lines = []
    if layout["prelude"]:
        lines.append(f"prelude   layers 0-{first - 1}, once")
    repeated = (
        f"× {layout['num_recursions']}" if layout["order"] == "cycle" else f"each × {layout['num_recursions']} in place"
    )
    lines.append(f"block     {layout['block_size']} shared layers {repeated}: positions {first}-{last - 1}")
    if layout["order"] == "cycle" and layout["num_recursions"] > 1:
        size = layout["block_size"]
        starts = [first + depth * size for depth in range(layout["num_recursions"])]
        spans = [f"depth {depth}: {start}-{start + size - 1}" for depth, start in enumerate(starts)]
        lines.append(f"          {', '.join(spans)}")
    if layout["coda"]:
        lines.append(f"coda      layers {last}-{layout['effective_layers'] - 1}, once")
    return "\n".join(lines)


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token over all effective layers."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * num_heads * head_dim * dtype.itemsize
