"""Base class, output and walk through the layers of recursive models.

Shape legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.output_capturing import OutputRecorder

from .configuration_recursive import RecursiveConfig


@dataclass
class RecursiveOutput(BaseModelOutputWithPast):
    """Output of :class:`RecursiveModel`.

    Attributes:
        boundary_states: Hidden states ``[B, T, D]`` after the recursion of each exit depth asked for, the input of the
            exit test.
        exit_states: Input ``[B, T, D]`` of the exit heads: the boundary states, after the coda where exits run it.
        layer_states: Hidden states ``[B, T, D]`` after every position that ran, in order, if asked for; not normed.
        routing: Decisions of a routed model's routers.
    """

    boundary_states: tuple[Tensor, ...] | None = None
    exit_states: tuple[Tensor, ...] | None = None
    layer_states: tuple[Tensor, ...] | None = None
    routing: Any = None


class RecursivePreTrainedModel(PreTrainedModel):
    """Common base of :class:`RecursiveModel` and :class:`RecursiveForCausalLM`."""

    config_class = RecursiveConfig
    config: RecursiveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values", "layer_past"]
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # By role, not by family: transformers keeps this per class, and one process may hold several families.
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": OutputRecorder(GradientCheckpointingLayer),
        "attentions": [OutputRecorder(None, 1, class_name=name) for name in (".self_attn", ".attention")],
    }

    def __init__(self, config: RecursiveConfig):
        family = MODEL_MAPPING[type(config.dense_config())]
        # PreTrainedModel.__init__ reads these from the instance; the family's layers decide what is supported.
        for flag in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            self.__dict__[flag] = getattr(family, flag)
        self.__dict__["_no_split_modules"] = ["SharedLayer", *(family._no_split_modules or [])]
        super().__init__(config)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        """Checkpoint every (block layer, depth) by itself, non-reentrantly.

        Raises:
            ValueError: ``use_reentrant=True``: under DDP a shared weight would be marked ready once per depth.
        """
        checkpoint_arguments = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if checkpoint_arguments["use_reentrant"]:
            raise ValueError(
                "Reentrant activation checkpointing runs a shared layer's backward once per recursion, and DDP then "
                "fails with 'marked ready twice'. Leave use_reentrant at False."
            )
        super().gradient_checkpointing_enable(checkpoint_arguments, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the module of ours does, or as the family does."""
        initialize = getattr(module, "init_weights", None)
        if initialize is not None:
            initialize()
        else:
            self._family_skeleton()._init_weights(module)

    def _family_skeleton(self) -> PreTrainedModel:
        raise AssertionError("defined by both models")


class LayerWalk:
    """One forward through the layers, called with each position in turn.

    Args:
        model: The model.
        states: Input ``[B, T, D]`` of the first layer.
        masks: Attention masks as transformers made them, one or by layer type.
        position_ids: ``[B, T]`` or ``[1, T]``.
        cache: KV cache, or None.
        arguments: Further arguments of every layer.
    """

    routing: Any = None
    """Decisions of routers; None without them."""

    def __init__(
        self, model: Any, states: Tensor, *, masks: Any, position_ids: Tensor, cache: Cache | None, arguments: Any
    ) -> None:
        self.model, self.layout = model, model.layout
        self.masks, self.position_ids, self.cache, self.arguments = masks, position_ids, cache, arguments
        self.rotations = model.rotations(states, position_ids)

    def __call__(self, position: int, states: Tensor) -> Tensor:
        """Run the layer at ``position`` and whatever follows it, ``[B, T, D] -> [B, T, D]``."""
        return self.run_layer(position, states)

    def run_layer(self, position: int, states: Tensor) -> Tensor:
        """Run the layer at ``position`` on all tokens, ``[B, T, D] -> [B, T, D]``."""
        return self.model.run_layer(
            position,
            states,
            masks=self.masks,
            rotations=self.rotations,
            position_ids=self.position_ids,
            kv_cache=self.cache,
            **self.arguments,
        )
