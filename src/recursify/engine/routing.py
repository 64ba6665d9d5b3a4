"""Routing: at the entry of each recursion, every token of a routed model enters or exits.

A token's router scores it by itself. A token that is not selected exits unchanged, through the coda; it has keys and
values only at the depths that it ran.

Shape legend: n tokens, D hidden size, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling.recursive_columns import on_device
from recursify.modeling.recursive_routing import (
    choose_above,
    depths_and_gates,
    expert_gates,
    gated,
    inference_threshold,
)

from .chunk import Chunk, known
from .host_sync import HostSync
from .layers.model_runner import ModelRunner


class RoutingStage:
    """Stage between two recursions of a routed model; same interface as :class:`~.early_exit.EarlyExitStage`."""

    def __init__(self, runner: ModelRunner, host_sync: HostSync) -> None:
        self.runner, self.host_sync = runner, host_sync
        self.config = runner.decoder.config
        self.model = runner.decoder.model.model
        self.last_depth = runner.decoder.num_depths - 1

    def enter(self, chunks: Sequence[Chunk]) -> None:
        """Route new ``chunks`` at the first recursion."""
        self._route(chunks)

    def pass_block(self, chunks: Sequence[Chunk]) -> None:
        """Gate the block's output, and route the tokens at the next depth.

        ``chunk.states`` are the block's output at ``chunk.depth`` for ``chunk.positions``.
        """
        for chunk in chunks:
            chunk.states = self._gate(chunk)
            chunk.depth += 1
        for chunk in chunks:
            if chunk.depth > self.last_depth:
                chunk.exit_tokens(chunk.positions, chunk.states, self.last_depth)
                chunk.positions = []
        self._route([chunk for chunk in chunks if not chunk.is_done])

    def _gate(self, chunk: Chunk) -> Tensor:
        entered, states, gates = known(chunk.entered), chunk.states, known(chunk.gates)
        if self.config.router == "token_choice" and self.config.router_gate == "mor":
            # As published: outputs add up unweighted, and the last one is weighted, next to the first input.
            is_last = (known(chunk.choices) == chunk.depth).unsqueeze(-1)
            return torch.where(is_last, gated(known(chunk.first), states, gates, "mor"), states)
        return gated(entered, states, gates, self.config.router_gate)

    def _route(self, chunks: Sequence[Chunk]) -> None:
        """Let the tokens of ``chunks`` enter the next recursion or exit, with one device-to-host copy for all."""
        if not chunks:
            return
        choose = self._choose_experts if self.config.router == "expert_choice" else self._choose_by_token
        by_depth: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            by_depth.setdefault(chunk.depth, []).append(chunk)
        chosen = [choose(depth, group) for depth, group in by_depth.items()]
        routed = [chunk for group in by_depth.values() for chunk in group]
        if all(selected is None for selected in chosen):
            for chunk in routed:
                self._admit(chunk, None)
            return
        decisions = [
            torch.ones(sum(len(chunk.positions) for chunk in group), dtype=torch.bool, device=self.runner.device)
            if selected is None
            else selected
            for selected, group in zip(chosen, by_depth.values(), strict=True)
        ]
        fetched = iter(self.host_sync.fetch(torch.cat(decisions)))
        for chunk in routed:
            self._admit(chunk, [next(fetched) for _ in chunk.positions])

    def _choose_experts(self, depth: int, chunks: Sequence[Chunk]) -> Tensor | None:
        """Tokens that the router of ``depth`` selects, bool ``[n]``, or None for all. Sets the chunks' gates."""
        states = torch.cat([chunk.states for chunk in chunks])
        router = self.model.routers[depth]
        logits = router(states)
        scores = logits[:, 0]
        if self.model.auxiliary_routers is not None:
            scores = self.model.auxiliary_routers[depth](states)[:, 0]
        _distribute(chunks, "gates", expert_gates(self.config, router, logits))
        threshold = inference_threshold(self.config, depth)
        if threshold is None:
            return None
        return choose_above(scores, torch.ones_like(scores, dtype=torch.bool), threshold)

    def _choose_by_token(self, depth: int, chunks: Sequence[Chunk]) -> Tensor | None:
        """Tokens that chose ``depth`` or a deeper one, bool ``[n]``, or None for all. Sets the chunks' gates."""
        if depth == 0:
            states = torch.cat([chunk.states for chunk in chunks])
            router = self.model.routers[0]
            choices, weights = depths_and_gates(self.config, router, router(states))
            _distribute(chunks, "choices", choices)
            _distribute(chunks, "weights", weights)
            for chunk in chunks:
                chunk.first = chunk.states
        choices = torch.cat([known(chunk.choices) for chunk in chunks])
        weights = torch.cat([known(chunk.weights) for chunk in chunks])
        _distribute(chunks, "gates", weights * (choices == depth))
        return None if depth == 0 else choices >= depth

    def _admit(self, chunk: Chunk, selected: list[bool] | None) -> None:
        """Exit the tokens of ``chunk`` that are not ``selected``; None selects all."""
        if selected is not None and not all(selected):
            outside = [index for index, enters in enumerate(selected) if not enters]
            inside = [index for index, enters in enumerate(selected) if enters]
            rows = on_device(outside, chunk.states.device, torch.long)
            positions = [chunk.positions[index] for index in outside]
            chunk.exit_tokens(positions, chunk.states[rows], chunk.depth - 1)
            rows = on_device(inside, chunk.states.device, torch.long)
            chunk.positions = [chunk.positions[index] for index in inside]
            for name in ("states", "gates", "choices", "weights", "first"):
                values = getattr(chunk, name)
                if values is not None:
                    setattr(chunk, name, values[rows])
        if chunk.positions:
            chunk.entered = chunk.states
            chunk.request.packed.setdefault(chunk.depth, []).extend(chunk.positions)


def _distribute(chunks: Sequence[Chunk], name: str, values: Tensor) -> None:
    """Set attribute ``name`` of every chunk to its part of ``values [n, ...]``."""
    sizes = [len(chunk.positions) for chunk in chunks]
    for chunk, part in zip(chunks, values.split(sizes), strict=True):
        setattr(chunk, name, part)
