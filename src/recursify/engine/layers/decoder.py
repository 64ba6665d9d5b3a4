"""A decoder taken apart into what an iteration of the engine calls: a recursive one, or any dense one as one recursion.

transformers' layers do the physics. What the engine adds is a registered attention function (``attention.py``), and,
for layers that run at several depths, linear maps and norms that take a depth per row (``mixed_layers.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recursify.errors import UnsupportedModelError
from recursify.modeling.recursive_columns import window_of
from recursify.modeling.recursive_routing import capacities_of

from .mixed_depth import DepthContext, mixed_layer
from .paged_attention import ATTENTION_NAME


@dataclass(eq=False)
class PagedLayer:
    """One stored layer.

    Attributes:
        module: transformers' layer; one of the block takes rows of all depths.
        part: Where it stands.
        kinds: By depth, the layer's attention type, where the family has several; else None.
        windows: By depth, how far back it looks; None for all the way.
        ropes: By depth, whether queries and keys are rotated.
        keys, values: ``[pages, page_size, heads, head size]``.
    """

    module: nn.Module
    part: Literal["prelude", "block", "coda"]
    kinds: tuple[str | None, ...]
    windows: tuple[int | None, ...]
    ropes: tuple[bool, ...] = (True,)
    keys: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    values: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(eq=False)
class DecoderAdapter:
    """What the engine runs.

    Attributes:
        model: The whole model.
        num_depths: Recursions; 1 where there is no boundary between any.
        prelude, block, coda: Layers in their order.
        spans: The depths of the rows in the call, which mixed layers read.
        embed: Token ids ``[N]`` to states ``[N, D]``.
        rotate: States and positions ``[N, 1]`` to RoPE's cosines and sines, or a dict of those by layer type.
        norm: The last one.
        compute_logits: Normed states ``[N, D]`` to logits ``[N, V]``.
    """

    model: Any
    num_depths: int
    prelude: list[PagedLayer]
    block: list[PagedLayer]
    coda: list[PagedLayer]
    depth_context: DepthContext
    embed: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor], Any]
    norm: nn.Module
    compute_logits: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        config = self.model.config
        self.config = config
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dtype = self.model.get_input_embeddings().weight.dtype
        self.device = self.model.get_input_embeddings().weight.device
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def head(self) -> nn.Linear | None:
        """What makes logits of normed states, before ``softcap``; None where that is not torch's own linear map."""
        head = self.model.get_output_embeddings()
        return head if type(head) is nn.Linear else None

    @property
    def exits_run_coda(self) -> bool:
        """Whether tokens that leave early go through the coda."""
        return self.is_routed or getattr(self.config, "exit_through_coda", True)

    @property
    def exits_share_head(self) -> bool:
        """Whether all exits read out with the model's own norm and head."""
        return self.is_routed or getattr(self.config, "exit_head", None) in (None, "shared")

    @property
    def rotates_by_length(self) -> bool:
        """Whether RoPE's frequencies depend on how long a text is, which the host has to ask the device."""
        return any("dynamic" in str(getattr(module, "rope_type", "")) for module in self.model.modules())

    @property
    def layers(self) -> list[PagedLayer]:
        return [*self.prelude, *self.block, *self.coda]

    @property
    def is_routed(self) -> bool:
        return getattr(self.config, "router", None) is not None

    @property
    def capacities(self) -> list[float]:
        """Of the routers, by depth; 1 in token choice, which has none."""
        if self.config.router != "expert_choice":
            return [1.0] * self.num_depths
        return list(capacities_of(self.config))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the layers call the engine's attention; outside, the model is as it was.

        It is one model: another thread that calls it meanwhile meets that attention.
        """
        before = self.config._attn_implementation
        self.config._attn_implementation = ATTENTION_NAME
        # Triton launches on the current GPU, whichever its tensors are on.
        on_gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        try:
            with on_gpu:
                yield
        finally:
            self.config._attn_implementation = before


def adapt_decoder(model: Any) -> DecoderAdapter:
    """The parts of a causal language model.

    Raises:
        UnsupportedModelError: It is not built as the engine needs it; the message names what is in the way.
    """
    if model.config.model_type == "recursive":
        return _recursive_parts(model)
    return _dense_parts(model)


def _recursive_parts(model: Any) -> DecoderAdapter:
    config, base, layout = model.config, model.model, model.config.layout
    if config.anderson:
        raise UnsupportedModelError(
            f"The model mixes loops (anderson={config.anderson}), which rows at unlike depths cannot take part in. "
            f"Make it with_recursions(..., anderson=0) for the engine."
        )
    if config.exit_depth is not None:
        raise UnsupportedModelError(
            f"The model is set to exit after depth {config.exit_depth} always (config.exit_depth). Set it to None, and "
            f"give requests max_depth={config.exit_depth}."
        )
    depth_context = DepthContext()

    def layer(module: nn.Module, part: Any, positions: list[int]) -> PagedLayer:
        kinds = tuple(base.layer_type(position) for position in positions)
        return PagedLayer(module, part, kinds, tuple(window_of(config, position) for position in positions))

    prelude = [layer(module, "prelude", [index]) for index, module in enumerate(base.prelude)]
    coda = [layer(module, "coda", [at]) for module, at in zip(base.coda, layout.coda_positions, strict=True)]
    if layout.order == "cycle":
        block = []
        for index, shared in enumerate(base.block):
            module, ropes = mixed_layer(shared, depth_context, f"layer {index} of the shared block")
            found = layer(module, "block", layout.positions(index))
            found.ropes = ropes
            block.append(found)
    else:
        # No boundary between recursions: the layers one after the other, each at its depth, are one recursion.
        inner = range(layout.num_prelude_layers, layout.coda_positions.start)
        slots = {position: layout.layer_ref(position) for position in inner}
        block = [layer(base.block[slot.index].views[slot.depth], "block", [at]) for at, slot in slots.items()]
    return DecoderAdapter(
        model=model,
        num_depths=layout.num_recursions if layout.order == "cycle" else 1,
        prelude=prelude,
        block=block,
        coda=coda,
        depth_context=depth_context,
        embed=base.embed_tokens,
        rotate=base.rotations,
        norm=base.norm,
        compute_logits=model.compute_logits,
    )


def _dense_parts(model: Any) -> DecoderAdapter:
    config, base = model.config, model.base_model
    children = dict(base.named_children())
    layers = children.get("layers")
    norms = [name for name in ("norm", "final_layer_norm", "final_layernorm") if name in children]
    if layers is None or not norms or "rotary_emb" not in children or len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"A {config.model_type} model is not built as embedding, RoPE, decoder layers, final norm: it has "
            f"{', '.join(children)}. The engine cannot run it."
        )
    rotary = children["rotary_emb"]
    by_layer_type = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)

    def rotate(states: Tensor, positions: Tensor) -> Any:
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
        block=[
            PagedLayer(module, "block", (kinds[index],), (window_of(config, index),))
            for index, module in enumerate(layers)
        ],
        coda=[],
        depth_context=DepthContext(),
        embed=model.get_input_embeddings(),
        rotate=rotate,
        norm=children[norms[0]],
        compute_logits=compute_logits,
    )
