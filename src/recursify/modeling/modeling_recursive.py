"""The recursive model: prelude, a shared block applied several times, coda.

transformers' own decoder layers do the physics. For every position the family's layer is built *at that position*, so
it carries what is not a weight (RoPE or NoPE, window, layer type, ``layer_idx``); inside the shared block each of its
weight-owning submodules is then replaced by a :class:`DepthView`, which calls the one stored submodule at its depth.
Caches, masks, paged attention and activation checkpointing see an ordinary model of ``num_hidden_layers`` layers; the
checkpoint sees every weight once.

Shape legend: B batch, T tokens, D hidden size, V vocabulary, I/O in/out features, R recursions (depths), r LoRA rank.

This file travels inside every checkpoint: it imports torch and transformers only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_recursive import RecursiveConfig
from .recursive_decoding import generate_with_exits, refuse_arguments
from .recursive_exits import ExitHead, ExitKind, read_vocabulary
from .recursive_layout import LayerRef, LayoutError
from .recursive_loops import LoopMixing, scale_step, with_recursions
from .recursive_policies import ExitSettings
from .recursive_routed_cache import RoutedCache
from .recursive_routed_walk import RoutedWalk, drop_key_projections, routed_generate_arguments
from .recursive_routing import RouterKind, Routing, TokenRouter, check_routers, make_auxiliary_routers, make_routers
from .recursive_speculation import SpeculationSettings, generate_speculatively

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"
"""What transformers calls a cache: ``cache`` from 5.24 on, in arguments and outputs alike."""


class UnsupportedFamily(ValueError):
    """A dense family whose layers cannot be shared; the message says which part and why."""


class RelaxedLinear(nn.Module):
    """A linear map shared by all depths, plus a low-rank residual and a bias of each depth.

    ``y = x Wᵀ + (x A[depth]ᵀ) B[depth]ᵀ + b[depth]`` (Relaxed Recursive Transformers, arXiv 2410.20672, section 2.2;
    LoRA scale 1). It *contains* an ``nn.Linear`` and is not one: tools that swap every ``nn.Linear`` (quantizers,
    vLLM) swap the shared weight and leave the residual standing.

    Parameters: ``linear.weight [O, I]``, ``lora_a [R, r, I]``, ``lora_b [R, O, r]`` (absent for rank 0), and
    ``bias [R, O]``, or ``[1, O]`` when tied, or absent.
    """

    def __init__(self, in_features: int, out_features: int, *, num_depths: int, rank: int, num_biases: int = 0):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.rank = rank
        self.lora_a = nn.Parameter(torch.empty(num_depths, rank, in_features)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(num_depths, out_features, rank)) if rank else None
        self.bias = nn.Parameter(torch.empty(num_biases, out_features)) if num_biases else None

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """``[..., I] -> [..., O]`` at ``depth``."""
        if self._merging_is_cheaper(x):
            assert self.lora_a is not None
            assert self.lora_b is not None
            y = _MergedLinear.apply(x, self.linear.weight, self.lora_a[depth], self.lora_b[depth])
            return self._add_bias(y, depth)
        return self.relax(self.linear(x), x, depth)

    def relax(self, y: Tensor, x: Tensor, depth: int) -> Tensor:
        """What the shared weight makes of ``x``, ``y [..., O]``, plus the residual and the bias of ``depth``."""
        if self.lora_a is not None and self.lora_b is not None:
            y = y + F.linear(F.linear(x, self.lora_a[depth]), self.lora_b[depth])
        return self._add_bias(y, depth)

    def _add_bias(self, y: Tensor, depth: int) -> Tensor:
        if self.bias is not None:
            y = y + self.bias[depth if len(self.bias) > 1 else 0]
        return y

    def _merging_is_cheaper(self, x: Tensor) -> bool:
        """Whether ``W + B A`` takes fewer multiplications than ``B (A x)``, in training all weights.

        Over ``N`` tokens the residual alone costs ``N r (I + O)``, and the merged weight ``r I O``. Forward and
        backward on one CPU core (``N = 1024``, ``I = 576``, ``O = 1536``, ``r = 64``): 60 ms for a bare linear map, 78
        with the residual, 66 merged. A linear that is not torch's own, or that someone listens to, is called.
        """
        linear = self.linear
        if self.lora_a is None or not (self.training and torch.is_grad_enabled()):
            return False
        if type(linear) is not nn.Linear or not linear.weight.requires_grad:
            return False
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
            return False
        return x.numel() // linear.in_features > linear.in_features * linear.out_features / sum(linear.weight.shape)

    def merged_weight(self, depth: int) -> Tensor:
        """``W + B[depth] A[depth]``, ``[O, I]`` in float32 or better: what a dense layer would hold at ``depth``."""
        weight = self.linear.weight.to(torch.promote_types(self.linear.weight.dtype, torch.float32))
        if self.lora_a is None or self.lora_b is None:
            return weight
        return weight + self.lora_b[depth].to(weight.dtype) @ self.lora_a[depth].to(weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class _MergedLinear(torch.autograd.Function):
    """``x (W + B A)ᵀ``, whose backward pass makes ``W + B A`` again, so that no merged weight is kept.

    Under autocast the products are in its dtype, and so is the merged weight, as a dense layer's would be.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            return F.linear(x.to(dtype), _merge(weight, lora_a, lora_b, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.dtype = output.dtype
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.to(ctx.dtype)
            x_grad = grad @ _merge(weight, lora_a, lora_b, ctx.dtype) if ctx.needs_input_grad[0] else None
            merged_grad = grad.flatten(0, -2).mT @ x.to(ctx.dtype).flatten(0, -2)
            a_grad = lora_b.to(ctx.dtype).mT @ merged_grad if ctx.needs_input_grad[2] else None
            b_grad = merged_grad @ lora_a.to(ctx.dtype).mT if ctx.needs_input_grad[3] else None
        return x_grad, merged_grad, a_grad, b_grad


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> Tensor:
    """``W + B A``: the product in ``dtype``, the sum in that of ``W``, ``dtype`` at the end."""
    return (weight + lora_b.to(dtype) @ lora_a.to(dtype)).to(dtype)


class PerDepth(nn.Module):
    """A small submodule (a norm) of which every depth keeps its own copy, or all depths one when tied."""

    def __init__(self, copies: list[nn.Module]):
        super().__init__()
        self.copies = nn.ModuleList(copies)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return self.copies[depth if len(self.copies) > 1 else 0](x)


class DepthView(nn.Module):
    """Stands in a family's layer for a submodule that owns weights, and calls the stored one at its depth.

    The stored module is deliberately not registered here. A weight has one owner, so that safetensors, FSDP and
    adapters meet it once. Depth is a constant of the view and an argument of the call, never mutable state: with a
    depth set from outside, activation checkpointing recomputes every recursion at the last one, and the gradients are
    silently wrong (tests/modeling/test_checkpointing.py).
    """

    stored: nn.Module

    def __init__(self, stored: nn.Module, depth: int):
        super().__init__()
        object.__setattr__(self, "stored", stored)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        return self.stored(x, self.depth)

    def extra_repr(self) -> str:
        return f"{type(self.stored).__name__}, depth={self.depth}"


class SharedLayer(nn.Module):
    """One layer of the shared block: its weights once, and one weightless view of the family's layer per depth.

    This is the unit that FSDP wraps (with ``reshard_after_forward=False``, or each recursion gathers again).

    Args:
        config: The model's config.
        index: Which layer of the block this is.
        layers: The family's decoder layers, built on the meta device at this layer's positions, by depth. They become
            the views.

    Raises:
        LayoutError: The layers differ in kind or shape.
        UnsupportedFamily: A submodule whose weights are neither a linear map nor vectors.
    """

    def __init__(self, config: RecursiveConfig, index: int, layers: list[nn.Module]):
        super().__init__()
        _check_alike(layers, config.layout.positions(index))
        self.shared_paths: list[str] = []
        for path, module in list(weight_owners(layers[0])):
            stored = self._stored(config, index, path, module, [layer.get_submodule(path) for layer in layers])
            _nest(self, path, stored)
            self.shared_paths.append(path)
            for depth, layer in enumerate(layers):
                layer.set_submodule(path, DepthView(stored, depth))
        if config.residual_scale != 1:
            for layer in layers:
                layer.register_forward_hook(partial(scale_step, scale=config.residual_scale))
        self.views = nn.ModuleList(layers)

    @staticmethod
    def _stored(
        config: RecursiveConfig, index: int, path: str, module: nn.Module, at_depths: list[nn.Module]
    ) -> nn.Module:
        """The one stored module that replaces ``module`` at all depths."""
        num_own = 1 if config.tie_norms else len(at_depths)
        if isinstance(module, nn.Linear):
            return RelaxedLinear(
                module.in_features,
                module.out_features,
                num_depths=len(at_depths),
                rank=config.rank_of(index, path, module.in_features, module.out_features),
                num_biases=0 if module.bias is None else num_own,
            )
        return PerDepth([materialize(copy) for copy in at_depths[:num_own]])

    def forward(self, hidden_states: Tensor, depth: int, **layer_arguments: Any) -> Tensor:
        """``[B, T, D] -> [B, T, D]`` at ``depth``; ``layer_arguments`` are those of the family's own layer."""
        return self.views[depth](hidden_states, **layer_arguments)

    def stored_modules(self) -> Iterator[tuple[str, RelaxedLinear | PerDepth]]:
        """The stored modules with their paths inside the family's layer."""
        for path in self.shared_paths:
            stored = self.get_submodule(path)
            assert isinstance(stored, RelaxedLinear | PerDepth)
            yield path, stored

    def replace_stored(self, path: str, module: RelaxedLinear | PerDepth) -> None:
        """Store ``module`` at ``path`` instead, and have every view call it."""
        self.set_submodule(path, module)
        for view in self.views:
            object.__setattr__(view.get_submodule(path), "stored", module)


def weight_owners(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules of a dense layer that own weights, each of which can be shared.

    Raises:
        UnsupportedFamily: One of them cannot: it is neither ``nn.Linear`` nor made of vectors (a norm).
    """
    for path, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(True for _ in module.buffers(recurse=False)):
            raise UnsupportedFamily(
                f"'{path}' ({type(module).__name__}) keeps state in buffers, which cannot be shared."
            )
        if not own:
            continue
        vectors_only = all(weight.ndim <= 1 for weight in own.values())
        if not path or any(True for _ in module.children()) or not (isinstance(module, nn.Linear) or vectors_only):
            shapes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in own.items())
            raise UnsupportedFamily(
                f"'{path}' ({type(module).__name__}: {shapes}) is neither a linear map nor a norm, and only those can "
                f"be shared."
            )
        yield path, module


def _check_alike(layers: list[nn.Module], positions: list[int]) -> None:
    """Layers that share weights must own the same ones."""
    described = [
        {
            path: (type(module).__name__, {name: list(p.shape) for name, p in module.named_parameters(recurse=False)})
            for path, module in layer.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }
        for layer in layers
    ]
    for other in range(1, len(layers)):
        for path in described[0].keys() | described[other].keys():
            first, second = described[0].get(path, "nothing"), described[other].get(path, "nothing")
            if first != second:
                raise LayoutError(
                    f"Layers {positions[0]} and {positions[other]} cannot share weights: '{path}' is {first} in one "
                    f"and {second} in the other. Choose a prelude, coda or number of recursions that ties like layers."
                )


def _nest(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register ``module`` under a dotted path, making the containers in between."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def materialize(module: nn.Module) -> nn.Module:
    """Move a module built on the meta device to the ambient one, its weights unset until ``post_init``."""
    return module.to_empty(device=torch.empty(0).device)


class DenseFamily:
    """The parts of a dense family's model, built on the meta device from a recursive config.

    Raises:
        UnsupportedFamily: The family's model has parts beyond embedding, decoder layers, final norm and RoPE.
    """

    def __init__(self, config: RecursiveConfig):
        self.model_class: type[PreTrainedModel] = MODEL_MAPPING[type(config.dense_config())]
        with torch.device("meta"):
            skeleton = self.model_class(config)
        self.skeleton = skeleton
        parts = dict(skeleton.named_children())
        self.embed_tokens = skeleton.get_input_embeddings()
        self.layers = list(parts.get("layers", ()))
        norms = [name for name in ("norm", "final_layer_norm", "final_layernorm") if name in parts]
        if len(self.layers) != config.num_hidden_layers or not norms or "rotary_emb" not in parts:
            raise UnsupportedFamily(
                f"Family '{config.dense_model_type}' is not built as embedding, RoPE, decoder layers, final norm: it "
                f"has {', '.join(parts)}."
            )
        self.norm = parts[norms[0]]
        self.rotary_emb = parts["rotary_emb"]
        known = {id(part) for part in (self.embed_tokens, self.rotary_emb, self.norm, parts["layers"])}
        others = [
            name for name, part in parts.items() if id(part) not in known and any(True for _ in part.parameters())
        ]
        if others:
            raise UnsupportedFamily(
                f"Family '{config.dense_model_type}' feeds its layers from {', '.join(others)}, outside the decoder "
                f"layers: looping them would feed every recursion the wrong input."
            )
        arguments = inspect.signature(self.layers[0].forward).parameters
        names = ("cache", "layer_past", "past_key_values")
        self.cache_argument = next((name for name in names if name in arguments), CACHE_ARGUMENT)
        self.rope_by_layer_type = "layer_type" in inspect.signature(self.rotary_emb.forward).parameters

    def strip(self) -> PreTrainedModel:
        """The skeleton without its parts: what is left knows how the family initializes a module."""
        for name in list(self.skeleton._modules):
            del self.skeleton._modules[name]
        return self.skeleton


@dataclass
class RecursiveOutput(BaseModelOutputWithPast):
    """What :class:`RecursiveModel` returns.

    Attributes:
        boundary_states: ``[B, T, D]`` after the recursion of each exit depth asked for, where the exit test looks.
        exit_states: The same after the coda where exits run it: what an exit reads out.
        layer_states: ``[B, T, D]`` after every position that ran, in order, if asked for; none of them normed.
        routing: What the routers of a routed model decided.
    """

    boundary_states: tuple[Tensor, ...] | None = None
    exit_states: tuple[Tensor, ...] | None = None
    layer_states: tuple[Tensor, ...] | None = None
    routing: Routing | None = None


class RecursivePreTrainedModel(PreTrainedModel):
    """What :class:`RecursiveModel` and :class:`RecursiveForCausalLM` have in common."""

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
        # PreTrainedModel.__init__ reads these from the instance: what the family's layers can do is what we can do.
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
        """The family's own; LoRA starts at zero (A as ``nn.Linear``, B zero), exit tests and routers at even odds."""
        if isinstance(module, RelaxedLinear | ExitHead) and module.lora_a is not None:
            bound = 1 / math.sqrt(module.lora_a.shape[-1])
            init.uniform_(module.lora_a, -bound, bound)
            init.zeros_(module.lora_b)
        if isinstance(module, RelaxedLinear):
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ExitHead):
            init.zeros_(module.test.weight)
            init.zeros_(module.test.bias)
        elif isinstance(module, TokenRouter):
            if module.inner is not None:
                init.normal_(module.inner, std=module.inner.shape[1] ** -0.5)
            for zero in (module.weight, *module.buffers()):
                if zero is not None:
                    init.zeros_(zero)
        else:
            self._family_skeleton()._init_weights(module)

    def _family_skeleton(self) -> PreTrainedModel:
        raise AssertionError("defined by both models")


class RecursiveModel(RecursivePreTrainedModel):
    """Embedding, prelude, shared block, coda and final norm: ``input_ids [B, T] -> last_hidden_state [B, T, D]``."""

    def __init__(self, config: RecursiveConfig):
        super().__init__(config)
        family = DenseFamily(config)
        layout = config.layout
        self.layout = layout
        self.embed_tokens = materialize(family.embed_tokens)
        self.rotary_emb = materialize(family.rotary_emb)
        self.prelude = nn.ModuleList(materialize(layer) for layer in family.layers[: layout.num_prelude_layers])
        self.block = nn.ModuleList(
            SharedLayer(config, index, [family.layers[position] for position in layout.positions(index)])
            for index in range(layout.block_size)
        )
        self.coda = nn.ModuleList(materialize(layer) for layer in family.layers[layout.coda_positions.start :])
        self.norm = materialize(family.norm)
        self.routers: nn.ModuleList | None = None
        self.auxiliary_routers: nn.ModuleList | None = None
        self.training_capacities: list[float] | None = None
        if config.router is not None:
            self._make_routers()

        self.cache_argument = family.cache_argument
        self.rope_by_layer_type = family.rope_by_layer_type
        self.repetitions = config.repetitions if config.anderson else None
        self.gradient_checkpointing = False
        object.__setattr__(self, "_skeleton", family.strip())
        self.post_init()

    def _family_skeleton(self) -> PreTrainedModel:
        return self._skeleton

    def _make_routers(self) -> None:
        self.routers, self.auxiliary_routers = make_routers(self.config), make_auxiliary_routers(self.config)
        if self.config.router_kv == "shared":
            drop_key_projections(self.block)

    def _new_cache(self) -> Cache | None:
        if self.routers is None:
            return DynamicCache(config=self.config)
        # What chooses from whole sequences has no use for a cache.
        return None if self.training else RoutedCache(self.config)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_recursions: int | None = None,
        exit_depth: int | None = None,
        exit_depths: Iterable[int] = (),
        return_layer_states: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RecursiveOutput:
        """Run all recursions, or the first ``num_recursions``, or as far as the exit after ``exit_depth``.

        Args:
            input_ids: ``[B, T]``; or give ``inputs_embeds [B, T, D]``.
            attention_mask: ``[B, past + T]`` with 0 at padding, a prepared 4-D mask, or a dict of those by layer type.
            position_ids: ``[B, T]``; counted from the cache's length if absent.
            past_key_values: A cache with one slot per effective position.
            use_cache: Make and return a cache.
            num_recursions: How often to apply the shared block before the coda, 1 .. R; all R if absent.
            exit_depth: The depth after which every token exits, with the coda or without as the config says; in the
                output, ``exit_states`` are what that exit reads out. ``config.exit_depth`` if neither is given.
            exit_depths: Depths at whose end to branch off ``exit_states``, for training and measuring; without a cache,
                since a coda that runs more than once would write its slots more than once.
            return_layer_states: Return the hidden states after every position.
            cache: The name of ``past_key_values`` from transformers 5.24 on; before, for attention functions.
            kwargs: Passed to every attention function.

        Raises:
            ValueError: ``num_recursions`` or an exit depth outside its range, both of them, or exit depths with a
                cache.
        """
        if CACHE_ARGUMENT == "cache":
            past_key_values = past_key_values if cache is None else cache
        elif cache is not None:
            kwargs["cache"] = cache  # before 5.24, what paged attention finds its pages by
        exit_depth = self.config.depth_to_exit_at(num_recursions, exit_depth)
        recursions = self._recursions(num_recursions, exit_depth)
        branches = self._branches(exit_depths, recursions, caches=bool(use_cache or past_key_values is not None))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = self._new_cache()
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + seen
        masks: Any = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_ARGUMENT: past_key_values},
            )
        without_coda = exit_depth is not None and not self.config.exit_through_coda
        rotations = self.rotations(inputs_embeds, position_ids)

        def run(position: int, states: Tensor) -> Tensor:
            layer_type = self.layer_type(position)
            return self.run_slot(
                self.layout.layer_ref(position),
                states,
                attention_mask=masks[layer_type] if isinstance(masks, dict) else masks,
                position_embeddings=rotations[layer_type] if isinstance(rotations, dict) else rotations,
                position_ids=position_ids,
                use_cache=use_cache,
                **{self.cache_argument: past_key_values},
                **kwargs,
            )

        mixing = LoopMixing(self.layout, self.repetitions, self.config.anderson) if self.repetitions else None
        walk: Callable[[int, Tensor], Tensor] = run
        if self.routers is not None:
            if return_layer_states:
                raise ValueError("return_layer_states: a routed model's layers run on unlike tokens. Leave it out.")
            walk = RoutedWalk(
                self,
                run,
                inputs_embeds,
                attention_mask=attention_mask,
                masks=masks,
                position_ids=position_ids,
                cache=past_key_values,
                arguments=kwargs,
            )
        hidden_states = inputs_embeds
        layer_states: list[Tensor] = []
        boundary_states: list[Tensor] = []
        for position, slot in enumerate(self.layout.slots()):
            if slot.depth >= recursions or (without_coda and slot.part == "coda"):
                continue
            entered, hidden_states = hidden_states, walk(position, hidden_states)
            if mixing is not None:
                hidden_states = mixing.after(slot, entered, hidden_states)
            if return_layer_states:
                layer_states.append(hidden_states)
            if slot.part == "block" and slot.index == self.layout.block_size - 1 and slot.depth in branches:
                boundary_states.append(hidden_states)
        exit_states = tuple(self._to_exit(states, run) for states in boundary_states)
        if exit_depth is not None:
            exit_states = (*exit_states, hidden_states)
        return RecursiveOutput(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_ARGUMENT: past_key_values if use_cache else None},
            boundary_states=tuple(boundary_states) or None,
            exit_states=exit_states or None,
            layer_states=tuple(layer_states) if return_layer_states else None,
            routing=walk.routing if isinstance(walk, RoutedWalk) else None,
        )

    def _recursions(self, num_recursions: int | None, exit_depth: int | None) -> int:
        """How many recursions to run."""
        if exit_depth is not None:
            return exit_depth + 1
        available = self.layout.num_recursions
        if num_recursions is not None and not 1 <= num_recursions <= available:
            raise ValueError(f"num_recursions={num_recursions} is outside 1 .. {available}: the model has no more.")
        return available if num_recursions is None else num_recursions

    def _branches(self, exit_depths: Iterable[int], recursions: int, *, caches: bool) -> set[int]:
        """The depths to branch off exits at, once it is certain that they can be."""
        wanted, running = set(exit_depths), self.config.exit_depths[:recursions]
        if wanted and caches:
            raise ValueError("exit_depths and a cache exclude one another: pass use_cache=False.")
        if not wanted <= set(running):
            raise ValueError(
                f"exit_depths={sorted(wanted)} are not all depths that run and have an exit: those are {list(running)}."
            )
        return wanted

    def _to_exit(self, boundary_states: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What an exit reads out, of the states at its boundary."""
        if self.config.exit_through_coda:
            for position in self.layout.coda_positions:
                boundary_states = run(position, boundary_states)
        return boundary_states

    def run_slot(self, slot: LayerRef, hidden_states: Tensor, **layer_arguments: Any) -> Tensor:
        """Run the layer at ``slot``: ``[B, T, D] -> [B, T, D]``."""
        if slot.part == "block":
            return self.block[slot.index](hidden_states, slot.depth, **layer_arguments)
        layer = self.prelude[slot.index] if slot.part == "prelude" else self.coda[slot.index]
        return layer(hidden_states, **layer_arguments)

    def layer_type(self, position: int) -> str | None:
        """Attention type at ``position`` (``"sliding_attention"``, ...), if the family tells them apart."""
        layer_types = getattr(self.config, "layer_types", None)
        return layer_types[position] if layer_types else None

    def rotations(self, hidden_states: Tensor, position_ids: Tensor) -> Any:
        """RoPE's cosines and sines, by layer type where the family has several bases (Gemma 3)."""
        if not self.rope_by_layer_type:
            return self.rotary_emb(hidden_states, position_ids)
        return {
            kind: self.rotary_emb(hidden_states, position_ids, kind) for kind in dict.fromkeys(self.config.layer_types)
        }


class RecursiveForCausalLM(RecursivePreTrainedModel, GenerationMixin):
    """A recursive model with its language-modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecursiveConfig):
        super().__init__(config)
        self.model = RecursiveModel(config)
        with torch.device("meta"):
            head = _dense_head(config)
        self.lm_head = materialize(head)
        self.exit_heads = self._make_exit_heads() if config.exit_head is not None else None
        self.post_init()

    def _family_skeleton(self) -> PreTrainedModel:
        return self.model._skeleton

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_recursions: int | None = None,
        exit_depth: int | None = None,
        objective: Callable[[RecursiveForCausalLM, RecursiveOutput], Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits ``[B, T, V]``, or of the last ``logits_to_keep`` tokens; and the loss, given ``labels [B, T]``.

        They are those of the last recursion that runs; see :meth:`RecursiveModel.forward` for ``num_recursions`` and
        ``exit_depth``. A whole model is run at a fixed depth by ``config.exit_depth``, which ``from_pretrained``
        takes as ``exit_depth=``.

        With an ``objective``, what it makes of this model and its last hidden states is returned, and no logits are
        computed here: a training loss that reads weights (a head, chunk by chunk) has to run inside this call, since
        FSDP holds them together no longer than that.
        """
        exit_depth = self.config.depth_to_exit_at(num_recursions, exit_depth)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_recursions=num_recursions,
            exit_depth=exit_depth,
            **kwargs,
        )
        if objective is not None:
            return objective(self, outputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if exit_depth is None:
            logits = self.compute_logits(outputs.last_hidden_state[:, kept, :])
        else:
            logits = self.compute_exit_logits(exit_depth, outputs.exit_states[-1][:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_ARGUMENT: getattr(outputs, CACHE_ARGUMENT)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _make_exit_heads(self) -> nn.ModuleList:
        kind, lm_head = cast(ExitKind, self.config.exit_head), cast(nn.Linear, self.lm_head)
        return nn.ModuleList(
            ExitHead(kind, self.model.norm, lm_head, self.config.exit_rank) for _ in self.config.exit_depths
        )

    def add_exit_heads(self, kind: ExitKind, *, rank: int = 64, through_coda: bool = True) -> None:
        """Give the model an exit head at every boundary; each starts as the model's own readout.

        Args:
            kind: One of :data:`~recursify.modeling.EXIT_HEADS`.
            rank: Of a ``low_rank`` head.
            through_coda: Whether a token that exits still runs the coda.

        Raises:
            ValueError: The layout has no boundaries between recursions, or an unknown kind or rank.
        """
        before = (self.config.exit_head, self.config.exit_rank, self.config.exit_through_coda)
        self.config.exit_head, self.config.exit_rank, self.config.exit_through_coda = kind, rank, through_coda
        try:
            self.config.check_exits()
        except ValueError:
            self.config.exit_head, self.config.exit_rank, self.config.exit_through_coda = before
            raise
        self.exit_heads = self._make_exit_heads()
        for head in self.exit_heads:
            head.apply(self._init_weights)
            cast(ExitHead, head).copy_from(self.model.norm, self.lm_head)

    def with_recursions(
        self, num_recursions: int, *, residual_scale: float | Literal["auto"] = "auto", anderson: int = 0
    ) -> Self:
        """A model that applies the shared block ``num_recursions`` times, fewer or more than this one does.

        It holds the same shared weights, in the same memory: what changes them in place in one changes both. Depth
        ``i`` of ``n`` takes a copy of what depth ``i · R // n`` has of its own here (residuals, norms, biases, window
        or RoPE), and an exit the head of the exit at which its time ends. Thresholds and ``exit_depth``, which were
        chosen for other exits, are left out unless ``n`` is ``R``. It is an ordinary model otherwise.

        Args:
            num_recursions: ``n``, at least 1. With ``R`` the logits are these, to the bit.
            residual_scale: What the shared layers' steps are multiplied by. ``"auto"`` is ``R / n``, a longer or
                shorter step of the same equation (arXiv 2310.12818); 1 leaves the layers as they are.
            anderson: How many earlier loops are mixed into each that repeats a depth, 0 for none. For a block that
                converges; exit policies and speculation refuse it. Recorded ``hidden_states`` are those before mixing.

        Raises:
            ValueError: Less than one recursion, a scale that is not positive, or a history where nothing repeats.
        """
        return with_recursions(self, num_recursions, residual_scale=residual_scale, anderson=anderson)

    def add_routers(self, kind: RouterKind, **fields: Any) -> None:
        """Give the model routers, in place of those it has; until they are trained, all tokens go everywhere.

        With ``router_kv="shared"`` the model is another at once: deeper recursions read the first one's keys.

        Args:
            kind: Of :data:`~recursify.modeling.ROUTERS`.
            fields: Router fields of :class:`RecursiveConfig` (``router_capacities=[1, 0.5]``); the others are as by
                default.

        Raises:
            ValueError: The layout has no boundaries between recursions, unknown fields, or fields that do not go
                together.
        """
        config = self.config
        known = {name: default for name, default in config.router_defaults().items() if name != "router"}
        if unknown := sorted(fields.keys() - known.keys()):
            raise ValueError(f"Unknown router field '{unknown[0]}'. There are: {', '.join(known)}.")
        before = {name: getattr(config, name) for name in ("router", *known)}
        if before["router_kv"] == "shared" != fields.get("router_kv", "recursion_wise"):
            raise ValueError(
                "The model's deeper recursions read the first one's keys and values, and have given up their own. Keep "
                "router_kv at 'shared', or start from the model as it was before."
            )
        for name, value in {**known, **fields, "router": kind}.items():
            setattr(config, name, value)
        try:
            check_routers(config)
        except ValueError:
            for name, value in before.items():
                setattr(config, name, value)
            raise
        self.model._make_routers()
        for routers in (self.model.routers, self.model.auxiliary_routers):
            for router in routers or ():
                router.to(self.device, self.dtype).apply(self._init_weights)

    def generate(
        self,
        inputs: Tensor | None = None,
        *arguments: Any,
        exit_policy: Any = None,
        speculate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, and two ways to run fewer layers for a token.

        With an ``exit_policy`` every row of the batch exits on its own, which is lossy. With ``speculate`` an exit
        drafts and the whole model checks: the output is that of the whole model.

        Args:
            inputs: Prompts ``[B, T]``, padded on the left.
            arguments: As transformers has them.
            exit_policy: A name (:data:`~recursify.modeling.EXIT_POLICIES`), a policy,
                :class:`~recursify.modeling.ExitSettings`, or a list of one per prompt.
            speculate: ``True``, or :class:`~recursify.modeling.SpeculationSettings`.
            kwargs: As transformers has them. Beams and assistants exclude both; sampling, logits processors, stopping
                criteria and streamers do not.

        Raises:
            ValueError: The model cannot exit so; see ``recursive_decoding.py``.
        """
        if self.model.routers is not None:
            if exit_policy is not None or speculate:
                raise ValueError("The model's routers say how far a token goes. Leave exit_policy and speculate out.")
            kwargs = routed_generate_arguments(self, kwargs, CACHE_ARGUMENT)
        if exit_policy is None and not speculate:
            return super().generate(inputs, *arguments, **kwargs)
        if exit_policy is not None and speculate:
            raise ValueError("Give exit_policy, which is lossy, or speculate, which is not; not both.")
        streamer = kwargs.get("streamer")

        def decode(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            prepared["streamer"] = streamer  # transformers keeps it from methods that are not its own
            if speculate:
                return generate_speculatively(model, input_ids, settings=SpeculationSettings.of(speculate), **prepared)
            given: list[Any] = exit_policy if isinstance(exit_policy, list) else [exit_policy]
            settings = [ExitSettings.from_options(entry, config=model.config) for entry in given]
            return generate_with_exits(model, input_ids, settings=settings, **prepared)

        refuse_arguments(kwargs)
        return super().generate(inputs, *arguments, custom_generate=decode, **kwargs)

    def lora_targets(self, *names: str) -> list[str]:
        """Linear maps for peft's ``LoraConfig(target_modules=…)``, by their full names.

        peft adapts an ``nn.Linear`` and refuses :class:`RelaxedLinear`, so a plain ``"q_proj"`` does not do. A shared
        map is adapted inside, at its ``linear``: its depths share the adapter, which may therefore be merged into it.

        Args:
            names: Of maps in the family's layers (``"q_proj"``, ``"down_proj"``); all of them if there are none.

        Raises:
            ValueError: The layers have no map of such a name.
        """
        maps = {
            path: path.removesuffix(".linear").rpartition(".")[2]
            for path, module in self.model.named_modules(prefix="model")
            if isinstance(module, nn.Linear)
        }
        if unknown := sorted(set(names) - set(maps.values())):
            there = ", ".join(sorted(set(maps.values())))
            raise ValueError(f"No linear map is called '{unknown[0]}'. There are: {there}.")
        return [path for path, name in maps.items() if not names or name in names]

    def compute_logits(self, hidden_states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[..., V]`` of normed hidden states ``[..., D]``, soft-capped where the family does so.

        With ``vocabulary``, those of its first so many entries.
        """
        return self._soft_cap(read_vocabulary(self.lm_head, hidden_states, vocabulary))

    def compute_exit_logits(self, depth: int, exit_states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[..., V]`` of an exit after ``depth``, of its ``exit_states [..., D]`` (which are not normed).

        A model without exit heads reads out with its own final norm and head.
        """
        if self.exit_heads is None:
            return self.compute_logits(self.model.norm(exit_states), vocabulary)
        return self._soft_cap(self.exit_heads[depth](exit_states, self.model.norm, self.lm_head, vocabulary))

    def _soft_cap(self, logits: Tensor) -> Tensor:
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _dense_head(config: RecursiveConfig) -> nn.Linear:
    """The family's own LM head (some have a bias)."""
    head_only = config.dense_config()
    head_only.num_hidden_layers = 0
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(head_only)](head_only).get_output_embeddings()


RecursiveConfig.register_for_auto_class()
RecursiveModel.register_for_auto_class("AutoModel")
RecursiveForCausalLM.register_for_auto_class("AutoModelForCausalLM")
