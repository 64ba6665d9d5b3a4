"""Running the shared block fewer or more times than it was made for.

A model with residual connections is read as an ordinary differential equation, of which every layer is one Euler step:
with another number of steps over the same time, each of them is longer or shorter (arXiv 2310.12818). A block that is
run until it changes its input no more has a fixed point instead, and Anderson mixing gets there in fewer loops
(arXiv 2111.13236).

Shape legend: B batch, T tokens, D hidden size, k loops looked back on.

This file travels inside every checkpoint: it imports torch only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 1e-4
"""Added to the squares of the differences of residuals, which are scaled to length 1: of differences that are nearly
parallel, as those of a slow loop in float32 are, hardly more is made than of one."""


def spread_depths(num_recursions: int, available: int) -> list[int]:
    """Which of the ``available`` depths each of ``num_recursions`` stands for: those that their times begin in.

    ``1`` of 2 is ``[0]``, ``4`` of 2 is ``[0, 0, 1, 1]``.
    """
    return [depth * available // num_recursions for depth in range(num_recursions)]


def spread_exits(num_recursions: int, available: int) -> list[int]:
    """Which of the ``available - 1`` exits each of ``num_recursions - 1`` stands for: those that their times end at."""
    ends = [-(-(depth + 1) * available // num_recursions) - 1 for depth in range(num_recursions - 1)]
    return [min(end, available - 2) for end in ends]


def scale_step(_: nn.Module, arguments: tuple[Any, ...], left: Tensor, *, scale: float) -> Tensor:
    """A layer's step times ``scale``: ``h + scale · (layer(h) - h)``, ``[B, T, D]``. A forward hook.

    It is a hook of the family's layer, since that is where transformers records hidden states, too.
    """
    entered = arguments[0]
    return entered + scale * (left - entered)


def anderson_mix(entered: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
    """The state to go on with, of the last ``k`` loops' inputs and outputs ``[..., D]``, each token by itself.

    With residuals ``f_i = left_i - entered_i`` it is ``left_k + Σ γ_i (left_i - left_k)``, where ``γ`` minimizes
    ``‖f_k + Σ γ_i (f_i - f_k)‖² + ridge``, in float32 or better (Walker and Ni, 2011, without damping). Of one loop it
    is that loop's output, and so it is where residuals are all alike.
    """
    if len(left) == 1:
        return left[0]
    last = left[-1]
    with torch.autocast(last.device.type, enabled=False):
        outputs = torch.stack(tuple(left)).to(torch.promote_types(last.dtype, torch.float32))
        residuals = outputs - torch.stack(tuple(entered)).to(outputs.dtype)
        towards, steps = outputs[:-1] - outputs[-1], residuals[:-1] - residuals[-1]
        length = torch.linalg.vector_norm(steps, dim=-1, keepdim=True).clamp(min=1e-12)
        towards, steps = towards / length, steps / length
        gram = torch.einsum("i...d,j...d->...ij", steps, steps)
        gram = gram + RIDGE * torch.eye(len(steps), dtype=gram.dtype, device=gram.device)
        wanted = -torch.einsum("i...d,...d->...i", steps, residuals[-1])
        # Not solve(), which waits for the device to say whether a matrix was singular: with the ridge none is.
        weights, _ = torch.linalg.solve_ex(gram, wanted.unsqueeze(-1))
        mixed = outputs[-1] + torch.einsum("...i,i...d->...d", weights.squeeze(-1), towards)
    return mixed.to(last.dtype)


class LoopMixing:
    """Anderson mixing during one forward.

    A loop is the block, or in a sequence one of its layers. Loops that run the same map one after the other mix: what
    goes on from each but the first of them is mixed of it and the ``history`` loops before it, as far as they go back.

    Args:
        layout: Of the model.
        repetitions: By depth, how many depths right before it run the same map.
        history: How many earlier loops are mixed in.
    """

    def __init__(self, layout: Any, repetitions: Sequence[int], history: int) -> None:
        self.is_sequence = layout.order == "sequence"
        self.last_layer = layout.block_size - 1
        self.repetitions = repetitions
        self.history = history
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []

    def after(self, slot: Any, entered: Tensor, left: Tensor) -> Tensor:
        """What goes on from the layer at ``slot``, which made ``left`` of ``entered``, ``[B, T, D]`` each."""
        if slot.part != "block":
            return left
        if self.is_sequence or slot.index == 0:
            kept = slice(-self.history, None) if self.repetitions[slot.depth] else slice(0)
            self.entered, self.left = [*self.entered[kept], entered], self.left[kept]
        if not self.is_sequence and slot.index != self.last_layer:
            return left
        self.left = [*self.left, left]
        return anderson_mix(self.entered, self.left)


PER_DEPTH = re.compile(r"(model\.block\.\d+\..+?)\.(copies\.(\d+)\..+|lora_a|lora_b|bias)")
"""Parameters of the block that every depth has its own of."""

EXIT = re.compile(r"exit_heads\.(\d+)\.(.+)")


def spread_parameters(
    state: Mapping[str, Tensor], depths: Sequence[int], exits: Sequence[int], *, tied: bool
) -> dict[str, Tensor]:
    """The state of a model of ``len(depths)`` recursions, of a model's ``state``.

    What all depths share is the same tensor. What a depth has of its own is copied, since two depths that begin alike
    are two parameters.

    Args:
        state: By name.
        depths: Whose parameters each depth takes.
        exits: Whose head each exit takes.
        tied: Whether norms and biases are shared, too.
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


def with_recursions(model: Any, num_recursions: int, *, residual_scale: Any, anderson: int) -> Any:
    """Behind ``RecursiveForCausalLM.with_recursions``, which says what it does."""
    before = model.config.num_recursions
    config = model.config.with_recursions(num_recursions, residual_scale=residual_scale, anderson=anderson)
    with torch.device("meta"):
        other = type(model)(config)
    depths, exits = spread_depths(num_recursions, before), spread_exits(num_recursions, before)
    state = spread_parameters(model.state_dict(), depths, exits, tied=config.tie_norms)
    other.load_state_dict(state, assign=True)
    # What is computed and not stored: RoPE's frequencies, Gemma's scale of embeddings. No shared layer has any.
    for path, module in other.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            module._buffers[name] = model.get_submodule(path)._buffers[name].clone()
    other.tie_weights()
    other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)
