"""FSDP2: weights, gradients and optimizer state sharded over all processes.

This calls torch's ``fully_shard`` directly instead of through accelerate, for three reasons. accelerate has one
``reshard_after_forward`` for all layers, and shared layers need another value. It makes the head a group of its own,
which torch would gather again for every chunk of the loss. And on CPUs it silently disables FSDP, so tests there would
not run the code that runs on GPUs.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from recursify.errors import TrainingError
from recursify.modeling import RecursiveForCausalLM

SHARDS_FOLDER = "shards"
"""Subfolder of a checkpoint with the shards, in the format of torch.distributed.checkpoint."""


def is_sharded(model: nn.Module) -> bool:
    """Tell whether :func:`shard` has been called on ``model``."""
    return isinstance(model, FSDPModule)


def shard(model: RecursiveForCausalLM) -> None:
    """Shard ``model`` over all processes, in place.

    Each layer is a group, whose weights are gathered before it runs. Prelude and coda layers are resharded after it;
    shared layers keep their gathered weights, or every recursion would gather them again. Embedding, final norm and
    head form one more group, that of the model, so that tied weights stay tied and are available in the whole forward.

    Raises:
        TrainingError: There is only one process, or a weight cannot be split over all of them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise TrainingError(
            "Sharding 'fsdp2' needs several processes, but there is one. Give --num-processes, start with accelerate "
            "launch or torchrun, or use sharding none."
        )
    world_size = dist.get_world_size()
    dimensions = {parameter: _dimension(name, parameter, world_size) for name, parameter in model.named_parameters()}

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(dimensions[parameter])

    base = model.model
    # If exits run the coda too, it runs more than once.
    repeats_coda = model.exit_heads is not None and model.config.exit_through_coda
    for layers, repeats in ((base.prelude, False), (base.coda, repeats_coda)):
        for layer in layers:
            fully_shard(layer, reshard_after_forward=not repeats, shard_placement_fn=placement)
    for layer in base.block:
        fully_shard(layer, reshard_after_forward=False, shard_placement_fn=placement)
    fully_shard(model, reshard_after_forward=False, shard_placement_fn=placement)
    # accelerate does not wrap a prepared model; any other would be wrapped in DDP.
    model._is_accelerate_prepared = True


def _dimension(name: str, parameter: nn.Parameter, world_size: int) -> int:
    """The dimension to shard: the first that is divisible, so that all shards have the same size.

    A residual ``[R, r, I]`` sharded along its depths would be empty on most processes, and an empty shard cannot be
    written to a checkpoint under the weight's name.
    """
    shape = tuple(parameter.shape)
    for dimension, size in enumerate(shape):
        if size % world_size == 0:
            return dimension
    # Only the first dimension can be sharded unevenly: into shards of the same size and a smaller last one.
    if math.ceil(shape[0] / world_size) * (world_size - 1) >= shape[0]:
        raise TrainingError(
            f"'{name}' {list(shape)} cannot be split into {world_size} shards. Use a number of processes that divides "
            f"one of its dimensions, or another sharding."
        )
    return 0


def reshard(model: nn.Module) -> None:
    """Free gathered weights; needed after a forward without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of this process; a tensor that is not sharded is returned whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the shards of weights and optimizer state into ``folder``; all processes call this."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / SHARDS_FOLDER)


def load_model_shards(folder: Path, model: nn.Module) -> None:
    """Load weights that :func:`save_shards` wrote; all processes call this."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder / SHARDS_FOLDER)
    set_model_state_dict(model, state["model"])


def load_optimizer_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state that :func:`save_shards` wrote; all processes call this."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / SHARDS_FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def gathered(model: RecursiveForCausalLM) -> RecursiveForCausalLM | None:
    """Gather the model in CPU memory on rank 0; the other ranks must call this as well and get None."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank():
        return None
    with torch.device("meta"):
        full_model = RecursiveForCausalLM(model.config)
    full_model.load_state_dict(weights, assign=True)
    full_model.tie_weights()
    return full_model
