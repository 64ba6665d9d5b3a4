"""Decoder adapter: the modules of a recursive model, or of a dense one as one recursion, as the engine calls them.

The layers are transformers' own decoder layers. The engine adds a registered attention function
(``paged_attention.py``) and, for layers that run at several depths, linear maps and norms that take a depth per row
(``mixed_depth.py``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recursify.errors import UnsupportedModelError
from recursify.modeling.modeling_recursive import RecursiveForCausalLM
from recursify.modeling.recursive_columns import on_device, window_of
from recursify.modeling.recursive_generation import prepares_inputs
from recursify.modeling.recursive_layers import applies
from recursify.modeling.recursive_rope import length_limits
from recursify.modeling.recursive_routing import capacities_of

from .attention_probe import POSITION, engine_attention, probe, rotates
from .length_rope import LengthRope
from .mixed_depth import DepthContext, mixed_layer
from .rotations import Rotations


@dataclass(eq=False)
class PagedLayer:
    """A stored layer with its keys and values in pages.

    Attributes:
        module: transformers' decoder layer; those of the block take rows of all depths.
        part: Part of the model that contains it.
        kinds: Attention type at each depth, in families with several types; else None.
        windows: Sliding window at each depth; None for full attention.
        ropes: True for each depth that rotates queries and keys.
        key_shape, value_shape: Number of heads and head size of the keys, and of the values.
        keys, values: Tensors ``[pages, page_size, heads, head size]`` of the KV cache.
    """

    module: nn.Module
    part: Literal["prelude", "block", "coda"]
    kinds: tuple[str | None, ...]
    windows: tuple[int | None, ...]
    ropes: tuple[bool, ...] = (True,)
    key_shape: Sequence[int] = (0, 0)
    value_shape: Sequence[int] = (0, 0)
    keys: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    values: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(eq=False)
class DecoderAdapter:
    """Modules of a decoder.

    Attributes:
        model: The complete model.
        num_depths: Number of recursions; 1 if tokens cannot exit between them.
        prelude, block, coda: Layers in order; a dense model has only a block.
        depth_context: Depths of the rows in the current call, which mixed-depth layers read.
        embed: Function from token ids ``[N]`` to states ``[N, D]``.
        rotary: Module of the RoPE.
        rotate: Function from states, positions ``[N, 1]`` and such a module to RoPE cosines and sines, or a dict of
            those by layer type.
        norm: Final norm.
        compute_logits: Function from normed states ``[N, D]`` to logits ``[N, V]``.
        length_rope: RoPE by the lengths of the requests; None where it does not depend on them.
    """

    model: Any
    num_depths: int
    prelude: list[PagedLayer]
    block: list[PagedLayer]
    coda: list[PagedLayer]
    depth_context: DepthContext
    embed: Callable[[Tensor], Tensor]
    rotary: Any
    rotate: Callable[[Tensor, Tensor, Any], Any]
    norm: nn.Module
    compute_logits: Callable[[Tensor], Tensor]
    length_rope: LengthRope | None = None

    def __post_init__(self) -> None:
        config = self.model.config
        self.config = config
        self.dtype = self.model.get_input_embeddings().weight.dtype
        self.device = self.model.get_input_embeddings().weight.device
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def head(self) -> nn.Linear | None:
        """LM head, before ``softcap``; None if it is not a plain ``nn.Linear``."""
        head = self.model.get_output_embeddings()
        return head if type(head) is nn.Linear else None

    @property
    def exits_run_coda(self) -> bool:
        """True if tokens that exit early run the coda."""
        return self.is_routed or getattr(self.config, "exit_through_coda", True)

    @property
    def exits_share_head(self) -> bool:
        """True if all exits use the model's own norm and LM head."""
        return self.is_routed or getattr(self.config, "exit_head", None) in (None, "shared")

    def limit_length(self, max_model_len: int) -> None:
        """Prepare RoPE for requests of at most ``max_model_len`` tokens."""
        if not length_limits(self.rotary):
            return
        family = getattr(self.model, "dense_class", type(self.model))
        rope = LengthRope(self.rotary, starts_again=prepares_inputs(family))
        if rope.key(max_model_len) == rope.key(1):
            self.rotary = rope.at(1)
        else:
            self.length_rope = rope

    def rotations(self, states: Tensor, positions: Tensor, lengths: Sequence[int] | None = None) -> Any:
        """RoPE cosines and sines of rows at ``positions [N, 1]``, which belong to sequences of ``lengths``."""
        rope = self.length_rope
        if rope is None or lengths is None:
            return self.rotate(states, positions, self.rotary)
        keys = list(map(rope.key, lengths))
        rotations = None
        for key, length in dict(zip(keys, lengths, strict=True)).items():
            tables = self.rotate(states, positions, rope.at(length))
            is_here = on_device([each == key for each in keys], states.device)[:, None, None]
            rotations = tables if rotations is None else _choose(is_here, tables, rotations)
        return rotations

    @property
    def has_plain_heads(self) -> bool:
        """True if a layer's keys are as large as its values, as kernels expect."""
        return all(layer.key_shape == layer.value_shape for layer in self.layers)

    @property
    def layers(self) -> list[PagedLayer]:
        """All layers in order."""
        return [*self.prelude, *self.block, *self.coda]

    @property
    def is_routed(self) -> bool:
        """True if routers decide how deep a token goes."""
        return getattr(self.config, "router", None) is not None

    @property
    def capacities(self) -> list[float]:
        """Capacity of the router at each depth; 1 without capacities, as in token choice."""
        if getattr(self.config, "router", None) != "expert_choice":
            return [1.0] * self.num_depths
        return list(capacities_of(self.config))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the layers call the engine's attention, on the model's device (:func:`engine_attention`)."""
        # Triton launches on the current GPU, not on that of its tensors.
        on_gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with engine_attention(self.config), on_gpu:
            yield


def _choose(where: Tensor, chosen: Any, other: Any) -> Any:
    """Tables of ``chosen`` in the rows ``where [N, 1, 1]``, else of ``other``: pairs, or dicts of pairs."""
    if isinstance(chosen, dict):
        return {kind: _choose(where, chosen[kind], other[kind]) for kind in chosen}
    return tuple(torch.where(where, *tables) for tables in zip(chosen, other, strict=True))


def adapt_decoder(model: Any) -> DecoderAdapter:
    """Adapt a causal language model for the engine.

    Raises:
        UnsupportedModelError: The engine cannot run the model; the message names the reason.
    """
    decoder = _adapt_recursive(model) if model.config.model_type == "recursive" else _adapt_dense(model)
    states = _probe_states(model)
    rotations = Rotations(decoder.rotate(states, torch.full((1, 1), POSITION, device=states.device), decoder.rotary))
    for layer in decoder.layers:
        seen = probe(layer.module, decoder.config, states, rotations.of(layer))
        (_, *layer.key_shape), (_, *layer.value_shape) = seen.key.shape, seen.value.shape
    return decoder


def _probe_states(model: Any) -> Tensor:
    """Hidden states ``[1, 1, D]`` to probe layers with."""
    weight = model.get_input_embeddings().weight
    values = torch.linspace(-1, 1, model.config.hidden_size, dtype=torch.float32)
    return values.to(weight.device, weight.dtype)[None, None]


def _adapt_recursive(model: Any) -> DecoderAdapter:
    config, base, layout = model.config, model.model, model.config.layout
    if not isinstance(model, RecursiveForCausalLM):
        raise UnsupportedModelError(
            "The model was loaded with the code in its checkpoint, and the engine needs recursify's own. Import "
            "recursify first, and load it without trust_remote_code."
        )
    if config.anderson:
        raise UnsupportedModelError(
            f"The model mixes loops (anderson={config.anderson}), which rows at different depths do not support. Load "
            f"it with_recursions(..., anderson=0) for the engine."
        )
    if config.exit_depth is not None:
        raise UnsupportedModelError(
            f"The model is set to exit after depth {config.exit_depth} always (config.exit_depth). Set it to None, and "
            f"use max_depth={config.exit_depth} in the requests."
        )
    depth_context = DepthContext()

    def layer(module: nn.Module, part: Any, positions: Sequence[int], ropes: tuple[bool, ...] = (True,)) -> PagedLayer:
        kinds = tuple(base.layer_type(position) for position in positions)
        return PagedLayer(module, part, kinds, tuple(_window(model, position) for position in positions), ropes)

    prelude = [layer(module, "prelude", [index]) for index, module in enumerate(base.prelude)]
    coda = [layer(module, "coda", [index]) for module, index in zip(base.coda, layout.coda_positions, strict=True)]
    if layout.order == "cycle":
        block = []
        for index, shared in enumerate(base.block):
            positions = layout.positions(index)
            rotate = functools.partial(_rotates, model, positions)
            module, ropes = mixed_layer(shared, depth_context, f"layer {index} of the shared block", rotate)
            block.append(layer(module, "block", positions, ropes))
    else:
        # Tokens cannot exit in the middle of a sequence: all layers in order, each at its depth, are one recursion.
        inner = range(layout.num_prelude_layers, layout.coda_positions.start)
        refs = {position: layout.layer_ref(position) for position in inner}
        block = [layer(base.block[ref.index].views[ref.depth], "block", [position]) for position, ref in refs.items()]
    return DecoderAdapter(
        model=model,
        num_depths=layout.num_recursions if layout.order == "cycle" else 1,
        prelude=prelude,
        block=block,
        coda=coda,
        depth_context=depth_context,
        embed=base.embed_tokens,
        rotary=base.rotary_emb,
        rotate=base.rotations,
        norm=base.norm,
        compute_logits=model.compute_logits,
    )


def _window(model: Any, position: int) -> int | None:
    """Attention window of a layer, if the model applies it.

    Raises:
        UnsupportedModelError: Attention that is neither full nor in a window.
    """
    config, family = model.config, type(model.base_model)
    try:
        window = window_of(config, position)
    except ValueError as error:
        raise UnsupportedModelError(f"The engine cannot run this {config.model_type} model: {error}") from error
    chunk = getattr(config, "attention_chunk_size", None)
    if config.model_type == "recursive":
        return window
    if chunk is not None and window is None and applies(family, "attention_chunk_size"):
        raise UnsupportedModelError(
            f"The engine cannot run this {config.model_type} model: its attention is in chunks of {chunk} tokens. Use "
            f"transformers' generate instead."
        )
    return window if applies(family, "sliding_window") else None


def _rotates(model: Any, positions: Sequence[int], depth: int, view: nn.Module) -> bool:
    """True if ``view``, the layer at ``depth`` of those at ``positions``, rotates queries and keys."""
    states = _probe_states(model)
    rotations = model.model.rotations(states, torch.full((1, 1), POSITION, device=states.device))
    if isinstance(rotations, dict):
        rotations = rotations[model.model.layer_type(positions[depth])]
    return rotates(view, model.config, states, rotations)


def _adapt_dense(model: Any) -> DecoderAdapter:
    config, base = model.config, model.base_model
    children = dict(base.named_children())
    layers = children.get("layers")
    norms = [name for name in ("norm", "final_layer_norm", "final_layernorm") if name in children]
    if layers is None or not norms or "rotary_emb" not in children or len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"The engine needs a model of embedding, RoPE, decoder layers and final norm; this {config.model_type} "
            f"model has {', '.join(children)}. Use transformers' generate instead."
        )
    rotary = children["rotary_emb"]
    by_layer_type = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)

    def rotate(states: Tensor, positions: Tensor, rotary: Any) -> Any:
        if not by_layer_type:
            return rotary(states, positions)
        return {kind: rotary(states, positions, kind) for kind in dict.fromkeys(kinds)}

    head = model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)

    def compute_logits(states: Tensor) -> Tensor:
        logits = head(states)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return DecoderAdapter(
        model=model,
        num_depths=1,
        prelude=[],
        block=[PagedLayer(module, "block", (kinds[i],), (_window(model, i),)) for i, module in enumerate(layers)],
        coda=[],
        depth_context=DepthContext(),
        embed=model.get_input_embeddings(),
        rotary=rotary,
        rotate=rotate,
        norm=children[norms[0]],
        compute_logits=compute_logits,
    )
