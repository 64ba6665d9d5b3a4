"""Layers of a recursive model: the family's own, sharing their weights between depths.

The layers are transformers' own decoder layers, unmodified. For every position the family's layer is built *at that
position*, so it carries what is not a weight (RoPE or NoPE, window, layer type, ``layer_idx``); inside the shared block
each of its weight-owning submodules is then replaced by a :class:`DepthView`, which calls the one stored submodule at
its depth.

Shape legend: B batch, T tokens, D hidden size, I/O in/out features, R recursions (depths), r LoRA rank.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .configuration_recursive import RecursiveConfig
from .recursive_exits import init_residual
from .recursive_layout import LayoutError

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"
"""Name of the cache in transformers' arguments and outputs: ``cache`` from 5.24 on."""

MASKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take a mask of any shape."""


MASKS = {"sliding_window": "create_sliding_window_causal_mask", "attention_chunk_size": "create_chunked_causal_mask"}
"""Mapping from fields that limit attention to the function of transformers that makes their mask."""


class UnsupportedFamily(ValueError):
    """Dense family whose layers cannot be shared; the message names the part and the cause."""


class RelaxedLinear(nn.Module):
    """A linear map shared by all depths, plus a low-rank residual and a bias of each depth.

    ``y = x Wᵀ + (x A[depth]ᵀ) B[depth]ᵀ + b[depth]`` (Relaxed Recursive Transformers, arXiv 2410.20672, section 2.2;
    LoRA scale 1). It *contains* an ``nn.Linear`` and is not one: tools that swap every ``nn.Linear`` (quantizers,
    vLLM) swap the shared weight and keep the residual.

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
        """``y [..., O]``, the shared weight's output for ``x``, plus the residual and the bias of ``depth``."""
        if self.lora_a is not None and self.lora_b is not None:
            y = y + F.linear(F.linear(x, self.lora_a[depth]), self.lora_b[depth])
        return self._add_bias(y, depth)

    def _add_bias(self, y: Tensor, depth: int) -> Tensor:
        if self.bias is not None:
            y = y + self.bias[depth if len(self.bias) > 1 else 0]
        return y

    def _merging_is_cheaper(self, x: Tensor) -> bool:
        """Compare the multiplications of ``W + B A`` and ``B (A x)``, in training all weights.

        Over ``N`` tokens the residual alone costs ``N r (I + O)``, and the merged weight ``r I O``. Forward and
        backward on one CPU core (``N = 1024``, ``I = 576``, ``O = 1536``, ``r = 64``): 60 ms for a bare linear map, 78
        with the residual, 66 merged. A linear of another class or with hooks is called instead.
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
        """``W + B[depth] A[depth]``, ``[O, I]`` in float32 or better: the weight of a dense layer at ``depth``."""
        weight = self.linear.weight.to(torch.promote_types(self.linear.weight.dtype, torch.float32))
        if self.lora_a is None or self.lora_b is None:
            return weight
        return weight + self.lora_b[depth].to(weight.dtype) @ self.lora_a[depth].to(weight.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the residual and the bias to zero."""
        init_residual(self.lora_a, self.lora_b)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


class _MergedLinear(torch.autograd.Function):
    """``x (W + B A)ᵀ``, whose backward pass recomputes ``W + B A`` instead of keeping it.

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
    """A small submodule (a norm) with one copy per depth, or one for all depths when tied."""

    def __init__(self, copies: list[nn.Module]):
        super().__init__()
        self.copies = nn.ModuleList(copies)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        return self.copies[depth if len(self.copies) > 1 else 0](x)


class DepthView(nn.Module):
    """Placeholder in a family's layer for a submodule that owns weights; it calls the stored one at its depth.

    The stored module is looked up by ``name`` in its ``owner`` at every call, so a tool that replaces it there (peft)
    changes all depths. Views are not registered as submodules (:func:`put`): with one owner per weight and one module
    per name, safetensors, FSDP and adapters see it once. Depth is a constant of the view and an argument of the call,
    never mutable state: with a depth set from outside, activation checkpointing recomputes every recursion at the last
    one, and the gradients are silently wrong (tests/modeling/test_checkpointing.py).
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, name: str, depth: int):
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.name, self.depth = name, depth

    @property
    def stored(self) -> nn.Module:
        """The stored module."""
        return getattr(self.owner, self.name)

    def forward(self, x: Tensor) -> Tensor:
        return self.stored(x, self.depth)

    def __deepcopy__(self, memo: dict[int, Any]) -> DepthView:
        return DepthView(memo.get(id(self.owner), self.owner), self.name, self.depth)

    def extra_repr(self) -> str:
        return f"{type(self.stored).__name__}, depth={self.depth}"


def put(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Have ``layer`` call ``module`` at ``path``.

    A :class:`DepthView` is a plain attribute, unless a container calls it, which knows only registered submodules.
    """
    where, _, name = path.rpartition(".")
    parent = layer.get_submodule(where)
    parent.__dict__.pop(name, None)
    if isinstance(module, DepthView) and not isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        parent._modules.pop(name, None)
        parent.__dict__[name] = module
    else:
        parent.add_module(name, module)  # in the place of the one before, if it is registered


class SharedLayer(nn.Module):
    """One layer of the shared block: its weights once, and one weightless view of the family's layer per depth.

    This is the unit for FSDP to wrap (with ``reshard_after_forward=False``, or each recursion gathers again).

    Args:
        config: Configuration of the model.
        index: Index of the layer in the block.
        layers: Decoder layers of the family by depth, built on the meta device; they become the views.

    Raises:
        LayoutError: The layers differ in kind or shape.
        UnsupportedFamily: A submodule with weights that are neither a linear map nor vectors.
    """

    def __init__(self, config: RecursiveConfig, index: int, layers: list[nn.Module]):
        super().__init__()
        _check_alike(layers, config.layout.positions(index))
        self.shared_paths = [path for path, _ in weight_owners(layers[0])]
        for path in self.shared_paths:
            stored = self._stored(config, index, path, [layer.get_submodule(path) for layer in layers])
            owner, name = _nest(self, path, stored)
            for depth, layer in enumerate(layers):
                put(layer, path, DepthView(owner, name, depth))
        if config.residual_scale != 1:
            for layer in layers:
                layer.register_forward_hook(partial(scale_step, scale=config.residual_scale))
        self.views = nn.ModuleList(layers)

    @staticmethod
    def _stored(config: RecursiveConfig, index: int, path: str, at_depths: list[nn.Module]) -> nn.Module:
        """The one stored module that replaces those of all depths."""
        module, num_own = at_depths[0], 1 if config.tie_norms else len(at_depths)
        if not isinstance(module, nn.Linear):
            return PerDepth([materialize(copy) for copy in at_depths[:num_own]])
        shape = (module.in_features, module.out_features)
        num_biases = 0 if module.bias is None else num_own
        return RelaxedLinear(
            *shape, num_depths=len(at_depths), rank=config.rank_of(index, path, *shape), num_biases=num_biases
        )

    def forward(self, hidden_states: Tensor, depth: int, **layer_arguments: Any) -> Tensor:
        """``[B, T, D] -> [B, T, D]`` at ``depth``; ``layer_arguments`` are those of the family's own layer."""
        return self.views[depth](hidden_states, **layer_arguments)

    def stored_modules(self) -> Iterator[tuple[str, RelaxedLinear | PerDepth]]:
        """The stored modules with their paths inside the family's layer."""
        for path in self.shared_paths:
            yield path, cast(RelaxedLinear | PerDepth, self.get_submodule(path))


def weight_owners(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules of a dense layer that own weights.

    Raises:
        UnsupportedFamily: A submodule that cannot be shared: neither ``nn.Linear`` nor made of vectors (a norm).
    """
    for path, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        named = f"'{path}'" if path else "A decoder layer itself"
        if buffers := [name for name, _ in module.named_buffers(recurse=False)]:
            raise UnsupportedFamily(
                f"{named} ({type(module).__name__}) keeps values in buffers ({', '.join(buffers)}), which cannot be "
                f"shared."
            )
        if not own:
            continue
        vectors_only = all(weight.ndim <= 1 for weight in own.values())
        if not path or any(True for _ in module.children()) or not (isinstance(module, nn.Linear) or vectors_only):
            shapes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in own.items())
            raise UnsupportedFamily(
                f"{named} ({type(module).__name__}: {shapes}) is neither a linear map nor a norm, and only those can "
                f"be shared."
            )
        yield path, module


def _check_alike(layers: list[nn.Module], positions: list[int]) -> None:
    """Require equal modules and shapes of layers that share weights."""
    described = [
        {
            path: (type(module).__name__, {name: list(p.shape) for name, p in module.named_parameters(recurse=False)})
            for path, module in layer.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }
        for layer in layers
    ]
    for position, other in zip(positions[1:], described[1:], strict=True):
        for path in described[0].keys() | other.keys():
            first, second = described[0].get(path, "nothing"), other.get(path, "nothing")
            if first != second:
                raise LayoutError(
                    f"Layers {positions[0]} and {position} cannot share weights: '{path}' is {first} in one "
                    f"and {second} in the other. Choose a prelude, coda or number of recursions that ties like layers."
                )


def _nest(root: nn.Module, path: str, module: nn.Module) -> tuple[nn.Module, str]:
    """Register ``module`` under a dotted path, creating the containers in between; its owner and its name there."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
    return root, name


def scale_step(_: nn.Module, arguments: tuple[Any, ...], left: Tensor, *, scale: float) -> Tensor:
    """Scale a layer's step, a forward hook: ``h + scale · (layer(h) - h)``, ``[B, T, D]``.

    It is a hook of the family's layer because transformers records hidden states there, too.
    """
    hidden_states = arguments[0]
    return hidden_states + scale * (left - hidden_states)


def materialize(module: nn.Module) -> nn.Module:
    """Move a module built on the meta device to the ambient one, its weights unset until ``post_init``."""
    return module.to_empty(device=torch.empty(0).device)


class FamilyParts:
    """The parts of a dense family's base model.

    Args:
        model: Base model (``LlamaModel``, ...), on any device.
        num_layers: Number of decoder layers that its config promises.

    Raises:
        UnsupportedFamily: The model has parts beyond embedding, decoder layers, final norm and RoPE.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int):
        parts = dict(model.named_children())
        self.embed_tokens = model.get_input_embeddings()
        self.layers = list(parts.get("layers", ()))
        norms = [name for name in ("norm", "final_layer_norm", "final_layernorm") if name in parts]
        if len(self.layers) != num_layers or not norms or "rotary_emb" not in parts:
            raise UnsupportedFamily(
                f"It is not built as embedding, RoPE, decoder layers, final norm: it has {', '.join(parts)}."
            )
        self.norm = parts[norms[0]]
        self.rotary_emb = parts["rotary_emb"]
        known = (self.embed_tokens, self.rotary_emb, self.norm, parts["layers"])
        others = [name for name, part in parts.items() if part not in known and any(True for _ in part.parameters())]
        if others:
            raise UnsupportedFamily(
                f"It feeds its layers from {', '.join(others)}, outside the decoder layers: looping them would feed "
                f"every recursion the wrong input."
            )


def applies(model_class: type, field: str) -> bool:
    """True if a family's ``model_class`` makes the mask that a ``field`` of :data:`MASKS` asks for.

    transformers keeps any field of ``config.json``. Llama has full attention whatever ``sliding_window`` there is.
    """
    module = sys.modules[model_class.__module__]
    return any(hasattr(module, name) for name in (MASKS[field], "create_masks_for_generate"))


class DenseFamily(FamilyParts):
    """The parts of a dense family's model, built on the meta device from a recursive config.

    Raises:
        UnsupportedFamily: The family's model has parts beyond embedding, decoder layers, final norm and RoPE.
    """

    def __init__(self, config: RecursiveConfig):
        self.model_class: type[PreTrainedModel] = MODEL_MAPPING[type(config.dense_config())]
        for field in MASKS:
            if getattr(config, field, None) is not None and not applies(self.model_class, field):
                setattr(config, field, None)  # or masks and caches would apply it
        with torch.device("meta"):
            self.skeleton = self.model_class(config)
        super().__init__(self.skeleton, config.num_hidden_layers)
        arguments = inspect.signature(self.layers[0].forward).parameters
        names = ("cache", "layer_past", "past_key_values")
        self.cache_argument = next((name for name in names if name in arguments), CACHE_ARGUMENT)
        self.rope_by_layer_type = "layer_type" in inspect.signature(self.rotary_emb.forward).parameters

    def strip(self) -> PreTrainedModel:
        """Remove the parts of the skeleton, which still knows how the family initializes a module."""
        self.skeleton._modules.clear()
        return self.skeleton
