"""Forward of a routed model: every recursion packs its tokens, runs the block on them alone and puts the results back.

So the cost of the block is that of its tokens, in training, prefill and decoding. Tokens keep their order, their RoPE
positions and their part of the sequence's mask: windows, padding and packed documents stay as they are. When all tokens
run a recursion, the block is called as without a router, with equal results to the last bit.

Shape legend: B batch, T tokens, D hidden size, s rows in a call, n tokens in a call, w keys.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from .recursive_base import LayerWalk
from .recursive_layers import CACHE_ARGUMENT, MASKED_ATTENTION, put
from .recursive_routed_cache import Packing, RoutedCache, pack
from .recursive_routing import (
    Routing,
    capacities_of,
    choose_above,
    choose_top_k,
    depths_and_gates,
    expert_gates,
    gated,
    inference_threshold,
    tokens_of,
)


class NoProjection(nn.Module):
    """Placeholder for a key or value projection with an unused output."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I] -> [..., O]``, zeros that take no memory."""
        return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)


def drop_key_projections(block: nn.ModuleList) -> None:
    """Remove the key and value projections of all depths but the first, unless they are fused (phi3, gpt_neox)."""
    layer: Any  # a SharedLayer
    for layer in block:
        for path, stored in layer.stored_modules():
            if path.rpartition(".")[2] in ("k_proj", "v_proj"):
                for view in list(layer.views)[1:]:
                    put(view, path, NoProjection(stored.linear.out_features))


class RoutedWalk(LayerWalk):
    """One forward of a routed model.

    Args:
        model: A ``RecursiveModel`` with routers.
        states: Input ``[B, T, D]`` of the first layer.
        attention_mask: Mask as given to the model; a ``[B, past + T]`` one marks padding.
        position_ids: ``[B, T]`` or ``[1, T]``.
        cache: A :class:`RoutedCache`, or None.
        call: Further arguments of :class:`LayerWalk`.

    Raises:
        ValueError: Another kind of cache or attention, or activation checkpointing with shared keys.
    """

    def __init__(
        self, model: Any, states: Tensor, *, attention_mask: Any, position_ids: Tensor, cache: Cache | None, **call: Any
    ) -> None:
        _check_call(model, cache)
        super().__init__(model, states, position_ids=position_ids, cache=cache, **call)
        self.config = model.config
        self.routers, self.auxiliary_routers = model.routers, model.auxiliary_routers
        self.num_rows, self.num_tokens, _ = states.shape
        self.position_by_row = position_ids.expand(self.num_rows, -1)
        self.chooses_top_k = model.training and cache is None
        self.capacities = capacities_of(self.config)
        if self.chooses_top_k and model.training_capacities is not None:
            self.capacities = model.training_capacities
        padded = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        self.real = attention_mask[:, -self.num_tokens :].bool() if padded else None
        self.store = cast(RoutedCache | None, cache)
        self.past = self.store.length if self.store is not None else 0
        if self.store is None and self.config.router_kv == "shared":
            self.store = RoutedCache(self.config)
        if self.store is not None:
            self.store.begin(self.num_rows, self.num_tokens, states.device)
        self.routing = Routing([], [], [], [])

    def __call__(self, position: int, states: Tensor) -> Tensor:
        """Run the layer at ``position``: inside a recursion on its tokens ``[s, n, D]``, else on ``[B, T, D]``."""
        ref = self.layout.layer_ref(position)
        if ref.part != "block":
            return self.run_layer(position, states)
        if ref.index == 0:
            states = self._enter(ref.depth, states)
        if self._packing is not None:
            states = self._run(position, states)
        if ref.index == self.layout.block_size - 1:
            states = self._leave(ref.depth, states)
        return states

    # --- Deciding ------------------------------------------------------------------------------------------------

    def _enter(self, depth: int, states: Tensor) -> Tensor:
        if depth == 0:
            self._first = states
            candidates = self.real
            if candidates is None:
                candidates = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        else:
            candidates = self.routing.selected[-1]
        choose = self._choose_experts if self.config.router == "expert_choice" else self._choose_by_token
        selected, self._gate = choose(depth, states, candidates)
        self.routing.candidates.append(candidates)
        self.routing.selected.append(selected)
        self._whole, self._packing = states, self._pack(depth, selected)
        if self._packing is None:
            return states
        if self.store is not None:
            self.store.aim(depth, self._packing, self.past, selected)
        self._entered = self._packing.take(states)
        self._masks: dict[str | None, Any] = {}
        self._positions = self._packing.take(self.position_by_row)
        self._packed_rotations = self.model.rotations(self._entered, self._positions)
        return self._entered

    def _choose_experts(self, depth: int, states: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Mask of the tokens that the router of ``depth`` selects, and their gates, each ``[B, T]``."""
        router = self.routers[depth]
        logits = router(states)
        deciding = scores = logits[..., 0]
        if self.auxiliary_routers is not None:
            deciding = self.auxiliary_routers[depth](states.detach())[..., 0]
            self.routing.deciding.append(deciding)
        self.routing.logits.append(scores)
        if self.chooses_top_k:
            selected = choose_top_k(scores, candidates, self.capacities[depth])
        else:
            selected = choose_above(deciding, candidates, inference_threshold(self.config, depth))
        return selected, expert_gates(self.config, router, logits)

    def _choose_by_token(self, depth: int, states: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Mask of the tokens that run ``depth``, and their gates, which only their last recursion has."""
        if depth == 0:
            logits = self.routers[0](states)
            self.routing.logits.append(logits)
            self._depths, self._scores = depths_and_gates(self.config, self.routers[0], logits)
        return candidates & (self._depths >= depth), self._scores * (self._depths == depth)

    # --- Moving --------------------------------------------------------------------------------------------------

    def _pack(self, depth: int, selected: Tensor) -> Packing | None:
        if self.chooses_top_k and self.real is None and self.config.router == "expert_choice":
            # Known without synchronizing.
            counts = [tokens_of(self.capacities[depth], self.num_tokens)] * self.num_rows
            is_whole = counts[0] == self.num_tokens
        else:
            left_out = ~selected if self.real is None else ~selected & self.real
            counts, missing = torch.stack([selected.sum(-1), left_out.sum(-1)]).tolist()
            is_whole = not any(missing)
        if is_whole and self.store is not None:
            home = self.store.home(depth)
            keys = self.past if home == depth else self.past + self.num_tokens
            is_whole = self.store.is_dense(home, self.num_rows, keys)
        if is_whole:
            columns = torch.arange(self.num_tokens, device=selected.device).expand_as(selected)
            counts = [self.num_tokens] * self.num_rows
            return Packing(None, columns, torch.ones_like(selected), counts, is_whole=True)
        return pack(selected, counts, all_rows=self.model.training)

    def _run(self, position: int, states: Tensor) -> Tensor:
        kind = self.model.layer_type(position)
        if kind not in self._masks:
            self._masks[kind] = self._mask(kind, states)
        return self.model.run_layer(
            position,
            states,
            masks=self._masks[kind],
            rotations=self._packed_rotations,
            position_ids=self._positions,
            kv_cache=self.store,
            **{**self.arguments, "use_cache": self.store is not None},
        )

    def _mask(self, kind: str | None, states: Tensor) -> Any:
        """Mask ``[s, 1, n, w]`` of the packed tokens, cut out of the whole one."""
        whole = self.masks[kind] if isinstance(self.masks, dict) else self.masks
        packing = self._packing
        assert packing is not None
        if packing.is_whole:
            return whole
        keys, is_key = packing.columns, packing.valid
        if self.store is not None:
            keys, is_key = self.store.seen(len(self.routing.selected) - 1)
        if whole is None:
            visible = keys[:, None, :] <= packing.columns[:, :, None] + self.past
        else:
            rows = packing.of_rows(torch.arange(self.num_rows, device=keys.device))
            rows = torch.zeros_like(rows) if len(whole) == 1 else rows
            found = whole[:, 0][rows[:, None, None], packing.columns[:, :, None], keys[:, None, :]]
            visible = found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2
        visible = visible & is_key[:, None, :]
        # Fill-up tokens see everything: the softmax of an empty row is NaN.
        visible = (visible | ~packing.valid[:, :, None])[:, None]
        if self.config._attn_implementation == "sdpa":
            return visible
        low = torch.finfo(states.dtype).min
        return torch.zeros(visible.shape, dtype=states.dtype, device=states.device).masked_fill(~visible, low)

    def _leave(self, depth: int, made: Tensor) -> Tensor:
        packing = self._packing
        if packing is None:
            return self._whole
        gate = packing.take(self._gate)
        if self.config.router == "token_choice" and self.config.router_gate == "mor":
            # As in the published code: recursions add up unweighted, the last one weighted with the first's input.
            is_last = packing.take(self._depths == depth).unsqueeze(-1)
            new = torch.where(is_last, gated(packing.take(self._first), made, gate, "mor"), made)
        else:
            new = gated(self._entered, made, gate, self.config.router_gate)
        return packing.put(self._whole, new)


def _check_call(model: Any, cache: Cache | None) -> None:
    config = model.config
    # By attribute and not by class: a model loaded with its own code has classes of its own.
    if cache is not None and not hasattr(cache, "aim"):
        raise ValueError(
            f"A routed model needs a RoutedCache, and got a {type(cache).__name__}. Leave it out (generate makes "
            f"the right one), or pass RoutedCache(model.config)."
        )
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"Routers need attention that takes any mask ({' or '.join(MASKED_ATTENTION)}), and the model's is "
            f"'{config._attn_implementation}'. Load it with attn_implementation='sdpa'."
        )
    checkpoints = model.training and getattr(model.block[0].views[0], "gradient_checkpointing", False)
    if config.router_kv == "shared" and checkpoints:
        raise ValueError(
            "router_kv 'shared' and activation checkpointing exclude one another: checkpointed layers are not given "
            "the first recursion's keys. Turn off gradient_checkpointing, or use router_kv recursion_wise."
        )


def routed_generate_arguments(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' ``generate`` for a routed model: the ``given`` ones and its cache."""
    settings = given.get("generation_config") or model.generation_config
    asked = {
        name: given.get(name, getattr(settings, name, None))
        for name in ("num_beams", "cache_implementation", "use_cache", "assistant_model", "prompt_lookup_num_tokens")
    }
    if model.config.router == "expert_choice" and (asked["num_beams"] or 1) > 1:
        raise ValueError(
            f"num_beams is {asked['num_beams']}, and the routers are expert_choice: beams compete by "
            f"their probability, and routers would give each beam another number of recursions. Leave num_beams out."
        )
    for name in ("cache_implementation", "assistant_model", "prompt_lookup_num_tokens"):
        if asked[name] is not None:
            raise ValueError(f"{name} does not work with routers, which need a cache of their own. Leave it out.")
    if asked["use_cache"] is False or any(given.get(name) is not None for name in ("cache", "past_key_values")):
        return given
    return {**given, CACHE_ARGUMENT: RoutedCache(model.config)}
