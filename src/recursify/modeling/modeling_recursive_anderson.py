"""A recursive model that mixes loops of its shared block (Anderson acceleration).

A block that is run until it no longer changes its input has a fixed point, and Anderson mixing gets there in fewer
loops (arXiv 2111.13236).

Shape legend: B batch, T tokens, D hidden size, k loops to mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from .configuration_recursive import RecursiveConfig
from .modeling_recursive import RecursiveForCausalLM as PlainForCausalLM
from .modeling_recursive import RecursiveModel as PlainModel
from .recursive_base import LayerWalk
from .recursive_layout import LayerLayout, LayerRef

RIDGE = 1e-4
"""Addend to the squared differences of residuals, scaled to length 1. It bounds the weights of nearly parallel
differences, such as those of a slow loop in float32."""


def anderson_mix(entered: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
    """Next state, mixed of the last ``k`` loops' inputs and outputs ``[..., D]``, for each token by itself.

    With residuals ``f_i = left_i - entered_i`` it is ``left_k + Σ γ_i (left_i - left_k)``, where ``γ`` minimizes
    ``‖f_k + Σ γ_i (f_i - f_k)‖² + ridge``, in float32 or better (Walker and Ni, 2011, without damping). For one loop,
    and for equal residuals, it is the last loop's output.
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
        # Not solve(), which synchronizes to check for singular matrices: with the ridge there are none.
        weights, _ = torch.linalg.solve_ex(gram, wanted.unsqueeze(-1))
        mixed = outputs[-1] + torch.einsum("...i,i...d->...d", weights.squeeze(-1), towards)
    return mixed.to(last.dtype)


class LoopMixing:
    """Anderson mixing during one forward.

    A loop is the block, or in a sequence one of its layers. Of consecutive loops that run the same map
    (:func:`repetitions`), each but the first passes on a mix of itself and up to ``history`` loops before it.
    """

    def __init__(self, layout: LayerLayout, repetitions: Sequence[int], history: int) -> None:
        self.is_sequence = layout.order == "sequence"
        self.last_layer = layout.block_size - 1
        self.repetitions, self.history = repetitions, history
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []

    def after(self, ref: LayerRef, entered: Tensor, left: Tensor) -> Tensor:
        """State after the layer at ``ref``, given its input ``entered`` and output ``left``, ``[B, T, D]`` each."""
        if ref.part != "block":
            return left
        if self.is_sequence or ref.index == 0:
            kept = slice(-self.history, None) if self.repetitions[ref.depth] else slice(0)
            self.entered, self.left = [*self.entered[kept], entered], self.left[kept]
        if not self.is_sequence and ref.index != self.last_layer:
            return left
        self.left = [*self.left, left]
        return anderson_mix(self.entered, self.left)


def repetitions(config: RecursiveConfig) -> list[int]:
    """Number of depths right before each depth that run the same map; 0 where another map begins.

    Depths run the same map if they have the same parameters and, in layers that differ in what is not a weight (window,
    RoPE or NoPE), the same kinds of layers.
    """
    layout = config.layout
    sources = config.depth_map or list(range(config.num_recursions))
    if config.tie_norms and not config.lora_rank and not any(config.lora_rank_pattern.values()):
        sources = [0] * config.num_recursions
    by_layer = list(config.fields_by_layer().values())
    maps = [
        (source, [[value[layout.position(index, depth)] for value in by_layer] for index in range(layout.block_size)])
        for depth, source in enumerate(sources)
    ]
    counts = [0]
    for before, here in pairwise(maps):
        counts.append(counts[-1] + 1 if here == before else 0)
    return counts


class AndersonWalk(LayerWalk):
    """One forward with Anderson mixing after every loop."""

    def __init__(self, model: Any, states: Tensor, **call: Any) -> None:
        super().__init__(model, states, **call)
        self.mixing = LoopMixing(self.layout, model.repetitions, model.config.anderson)

    def __call__(self, position: int, states: Tensor) -> Tensor:
        return self.mixing.after(self.layout.layer_ref(position), states, self.run_layer(position, states))


class RecursiveModel(PlainModel):
    """Embedding, prelude, shared block with Anderson mixing, coda and final norm."""

    def _add_parts(self) -> None:
        if not self.config.anderson:
            super()._add_parts()
            return
        self.repetitions = repetitions(self.config)
        if not any(self.repetitions):
            raise ValueError(
                f"anderson={self.config.anderson} mixes loops that repeat a depth, and of {self.layout.num_recursions} "
                f"recursions none does. Take more recursions than the model was made with, or leave anderson out."
            )

    def _make_walk(self, states: Tensor, attention_mask: Any, **call: Any) -> LayerWalk:
        if self.config.anderson:
            return AndersonWalk(self, states, **call)
        return super()._make_walk(states, attention_mask, **call)


class RecursiveForCausalLM(PlainForCausalLM):
    """A recursive model with Anderson mixing and its language-modelling head."""

    base_model_class: ClassVar[type[PlainModel]] = RecursiveModel
