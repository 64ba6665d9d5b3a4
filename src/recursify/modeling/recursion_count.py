"""Other numbers of recursions: a model that applies the shared block fewer or more times.

A model with residual connections is read as an ordinary differential equation, each layer being one Euler step: with
another number of steps over the same time, each step is longer or shorter (arXiv 2310.12818).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .configuration_recursive import RecursiveConfig


def spread_depths(num_recursions: int, available: int) -> list[int]:
    """Map each of ``num_recursions`` depths to the one of the ``available`` depths that its time begins in.

    ``1`` of 2 is ``[0]``, ``4`` of 2 is ``[0, 0, 1, 1]``.
    """
    return [depth * available // num_recursions for depth in range(num_recursions)]


def spread_exits(num_recursions: int, available: int) -> list[int]:
    """Map each of ``num_recursions - 1`` exits to the one of ``available - 1`` exits at which its time ends."""
    ends = [-(-(depth + 1) * available // num_recursions) - 1 for depth in range(num_recursions - 1)]
    return [min(end, available - 2) for end in ends]


PER_DEPTH = re.compile(r"(model\.block\.\d+\..+?)\.(copies\.(\d+)\..+|lora_a|lora_b|bias)")
"""Names of parameters of the block that differ by depth."""

EXIT = re.compile(r"exit_heads\.(\d+)\.(.+)")


def spread_parameters(
    state: Mapping[str, Tensor], depths: Sequence[int], exits: Sequence[int], *, tied: bool
) -> dict[str, Tensor]:
    """Spread a model's ``state`` over ``len(depths)`` recursions, given the sources of depths and exits.

    Shared parameters, among them norms and biases if ``tied``, are the same tensors; those of a depth are copied.
    """
    spread: dict[str, Tensor] = {}
    for name, tensor in state.items():
        exit_of, own = EXIT.fullmatch(name), PER_DEPTH.fullmatch(name)
        if exit_of is not None:
            number, rest = int(exit_of[1]), exit_of[2]
            for place, source in enumerate(exits):
                if source == number:
                    spread[f"exit_heads.{place}.{rest}"] = tensor.clone()
        elif own is None or (tied and not own[2].startswith("lora_")):
            spread[name] = tensor
        elif own[3] is None:
            spread[name] = tensor[list(depths)]
        else:
            rest = own[2].removeprefix(f"copies.{own[3]}.")
            for depth, source in enumerate(depths):
                if source == int(own[3]):
                    spread[f"{own[1]}.copies.{depth}.{rest}"] = tensor.clone()
    return spread


def config_with_recursions(
    config: RecursiveConfig, num_recursions: int, *, residual_scale: float | Literal["auto"] = "auto", anderson: int = 0
) -> RecursiveConfig:
    """Configuration of :func:`with_recursions`."""
    if num_recursions < 1:
        raise ValueError(f"A model has at least 1 recursion, got {num_recursions}.")
    if config.router is not None:
        raise ValueError(
            f"The model has {config.router} routers, which were trained for {config.num_recursions} recursions at "
            f"their scale. Use a model without routers."
        )
    changes: dict[str, Any] = {"num_recursions": num_recursions, "anderson": anderson, "residual_scale": residual_scale}
    if residual_scale == "auto":
        changes["residual_scale"] = config.residual_scale * config.num_recursions / num_recursions
    if num_recursions != config.num_recursions:
        depths = spread_depths(num_recursions, config.num_recursions)
        positions = config.layout.sources(depths)
        changes["num_hidden_layers"] = len(positions)
        changes["depth_map"] = depths if config.depth_map is None else [config.depth_map[depth] for depth in depths]
        changes |= {key: [value[at] for at in positions] for key, value in config.fields_by_layer().items()}
        changes |= {"exit_policy": None, "exit_thresholds": None, "exit_depth": None}
        if num_recursions == 1:
            changes["exit_head"] = None
    # Fields that follow from the layout, None here, are computed again.
    changes |= dict.fromkeys(("num_unique_layers", "layer_to_block", "block_size"))
    return type(config)(**{**config.to_dict(), **changes, "attn_implementation": config._attn_implementation})


def with_recursions(model: Any, num_recursions: int, **options: Any) -> Any:
    """A model that applies the shared block ``num_recursions`` times; see ``RecursiveForCausalLM.with_recursions``."""
    before = model.config.num_recursions
    config = config_with_recursions(model.config, num_recursions, **options)
    with torch.device("meta"):
        other = type(model)(config)
    depths, exits = spread_depths(num_recursions, before), spread_exits(num_recursions, before)
    state = spread_parameters(model.state_dict(), depths, exits, tied=config.tie_norms)
    other.load_state_dict(state, assign=True)
    # Computed buffers are not in the state: RoPE's frequencies, Gemma's scale of embeddings. No shared layer has any.
    for path, module in other.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            module._buffers[name] = model.get_submodule(path)._buffers[name].clone()
    other.tie_weights()
    other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)
