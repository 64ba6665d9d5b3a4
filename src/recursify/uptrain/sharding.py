"""FSDP2: every weight, its gradient and its optimizer state cut into one part per process.

torch's own ``fully_shard``, called by us and not by accelerate, for three causes. accelerate has one
``reshard_after_forward`` for all layers, and a shared layer needs another. It makes the head a group of its own, which
torch then gathers again for every chunk of the loss. And it leaves FSDP out on CPUs without a word, so that what is
tested there would not be what runs on GPUs.
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
"""Inside a checkpoint: what each process held, as torch.distributed.checkpoint writes it."""


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has been called on ``model``."""
    return isinstance(model, FSDPModule)


def shard(model: RecursiveForCausalLM) -> None:
    """Cut ``model`` over all processes, in place.

    A layer is a group: its weights are gathered together, before it runs. Those of prelude and coda are let go after
    it; a shared layer keeps its weights, or every recursion would gather them again. Embedding, final norm and head are
    one more group, the model's, so tied weights stay tied and are whole wherever in the forward they are read.

    Raises:
        TrainingError: There is one process, or more than a weight can be cut into.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise TrainingError(
            "Sharding 'fsdp2' cuts a model over several processes, and there is one. Give --num-processes, start it by "
            "accelerate launch or torchrun, or leave sharding at 'none'."
        )
    world_size = dist.get_world_size()
    dimensions = {parameter: _dimension(name, parameter, world_size) for name, parameter in model.named_parameters()}

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(dimensions[parameter])

    base = model.model
    # A coda that exits run, too, runs more than once.
    repeats_coda = model.exit_heads is not None and model.config.exit_through_coda
    for layers, repeats in ((base.prelude, False), (base.coda, repeats_coda)):
        for layer in layers:
            fully_shard(layer, reshard_after_forward=not repeats, shard_placement_fn=placement)
    for layer in base.block:
        fully_shard(layer, reshard_after_forward=False, shard_placement_fn=placement)
    fully_shard(model, reshard_after_forward=False, shard_placement_fn=placement)
    # accelerate takes a prepared model as it is, and would put any other into DDP.
    model._is_accelerate_prepared = True


def _dimension(name: str, parameter: nn.Parameter, world_size: int) -> int:
    """Where to cut: the first dimension that divides, so that all parts are alike.

    A residual ``[R, r, I]`` cut along its depths would lie whole on a few processes and be empty on the others, and an
    empty part cannot be written to a checkpoint under the weight's name.
    """
    shape = tuple(parameter.shape)
    for dimension, size in enumerate(shape):
        if size % world_size == 0:
            return dimension
    # Only the first dimension may be cut unevenly: into parts of the same size and a last one that is smaller.
    if math.ceil(shape[0] / world_size) * (world_size - 1) >= shape[0]:
        raise TrainingError(
            f"'{name}' {list(shape)} cannot be cut into {world_size} parts. Use a number of processes that divides one "
            f"of its dimensions, or another sharding."
        )
    return 0


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights: without a backward pass, nothing else does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, cut or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write every process's part of weights and optimizer state into ``folder``; called by all of them."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / SHARDS_FOLDER)


def load_model_shards(folder: Path, model: nn.Module) -> None:
    """Read weights that :func:`save_shards` wrote; called by all processes."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder / SHARDS_FOLDER)
    set_model_state_dict(model, state["model"])


def load_optimizer_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer state that :func:`save_shards` wrote; called by all processes."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / SHARDS_FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def gathered(model: RecursiveForCausalLM) -> RecursiveForCausalLM | None:
    """The whole model in CPU memory, on the first process; None on the others, which must call this too."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank():
        return None
    with torch.device("meta"):
        whole = RecursiveForCausalLM(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    return whole
