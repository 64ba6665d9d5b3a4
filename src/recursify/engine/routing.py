"""What happens to tokens at the entries of recursions in a model with routers.

A token's router scores it by itself. One that is not taken leaves as it is, through the coda; its keys and values are
at the depths that it went through, and nowhere else.

Shape legend: n tokens, D hidden size, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling.recursive_decoding import on_device
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
    """Of a routed model; the same two calls as :class:`~.boundaries.EarlyExitStage`."""

    def __init__(self, runner: ModelRunner, host_sync: HostSync) -> None:
        self.runner, self.host_sync = runner, host_sync
        self.config = runner.decoder.config
        self.model = runner.decoder.model.model
        self.last_depth = runner.decoder.num_depths - 1

    def enter(self, chunks: Sequence[Chunk]) -> None:
        """``flights`` come to the first recursion."""
        self._route(chunks)

    def pass_block(self, chunks: Sequence[Chunk]) -> None:
        """The block has run: ``flight.states`` are what it made of ``flight.positions`` at ``flight.depth``."""
        for chunk in chunks:
            chunk.states = self._gate(chunk)
            chunk.depth += 1
        ends = [chunk for chunk in chunks if chunk.depth > self.last_depth]
        for chunk in ends:
            chunk.exit_tokens(chunk.positions, chunk.states, self.last_depth)
            chunk.positions = []
        self._route([chunk for chunk in chunks if not chunk.is_done])

    def _gate(self, chunk: Chunk) -> Tensor:
        entered, made, gates = known(chunk.entered), chunk.states, known(chunk.gates)
        if self.config.router == "token_choice" and self.config.router_gate == "mor":
            # As published: recursions add up unweighted, and the last is weighted beside the first's input.
            is_last = (known(chunk.choices) == chunk.depth).unsqueeze(-1)
            return torch.where(is_last, gated(known(chunk.first), made, gates, "mor"), made)
        return gated(entered, made, gates, self.config.router_gate)

    def _route(self, chunks: Sequence[Chunk]) -> None:
        """Have tokens go into the recursion that ``flights`` have come to, or leave. One fetch for all."""
        choose = self._choose_experts if self.config.router == "expert_choice" else self._choose_by_token
        by_depth: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            by_depth.setdefault(chunk.depth, []).append(chunk)
        taken = [choose(depth, group) for depth, group in by_depth.items()]
        order = [chunk for group in by_depth.values() for chunk in group]
        if not order:
            return
        if all(each is None for each in taken):
            for chunk in order:
                self._take(chunk, None)
            return
        whole = [
            torch.ones(sum(len(chunk.positions) for chunk in group), dtype=torch.bool, device=self.runner.device)
            if each is None
            else each
            for each, group in zip(taken, by_depth.values(), strict=True)
        ]
        answers = iter(self.host_sync.fetch(torch.cat(whole)))
        for chunk in order:
            self._take(chunk, [next(answers) for _ in chunk.positions])

    def _choose_experts(self, depth: int, chunks: Sequence[Chunk]) -> Tensor | None:
        """Which tokens the router of ``depth`` takes, bool ``[n]``, None for all; notes their gates."""
        states = torch.cat([chunk.states for chunk in chunks])
        router = self.model.routers[depth]
        logits = router(states)
        deciding = logits[:, 0]
        if self.model.auxiliary_routers is not None:
            deciding = self.model.auxiliary_routers[depth](states)[:, 0]
        _hand_out(chunks, "gates", expert_gates(self.config, router, logits))
        threshold = inference_threshold(self.config, depth)
        if threshold is None:
            return None
        return choose_above(deciding, torch.ones_like(deciding, dtype=torch.bool), threshold)

    def _choose_by_token(self, depth: int, chunks: Sequence[Chunk]) -> Tensor | None:
        """Which tokens go as far as ``depth``, bool ``[n]``, None for all; notes their gates."""
        if depth == 0:
            states = torch.cat([chunk.states for chunk in chunks])
            router = self.model.routers[0]
            choices, weights = depths_and_gates(self.config, router, router(states))
            _hand_out(chunks, "choices", choices)
            _hand_out(chunks, "weights", weights)
            for chunk in chunks:
                chunk.first = chunk.states
        choices = torch.cat([known(chunk.choices) for chunk in chunks])
        weights = torch.cat([known(chunk.weights) for chunk in chunks])
        _hand_out(chunks, "gates", weights * (choices == depth))
        return None if depth == 0 else choices >= depth

    def _take(self, chunk: Chunk, taken: list[bool] | None) -> None:
        """Tokens of ``flight`` that are not ``taken`` leave; None takes all."""
        if taken is not None and not all(taken):
            outside = [number for number, goes in enumerate(taken) if not goes]
            inside = [number for number, goes in enumerate(taken) if goes]
            index = on_device(outside, chunk.states.device, torch.long)
            positions = [chunk.positions[number] for number in outside]
            chunk.exit_tokens(positions, chunk.states[index], chunk.depth - 1)
            index = on_device(inside, chunk.states.device, torch.long)
            chunk.positions = [chunk.positions[number] for number in inside]
            for name in ("states", "gates", "choices", "weights", "first"):
                held = getattr(chunk, name)
                if held is not None:
                    setattr(chunk, name, held[index])
        if chunk.positions:
            chunk.entered = chunk.states
            chunk.request.packed.setdefault(chunk.depth, []).extend(chunk.positions)


def _hand_out(chunks: Sequence[Chunk], name: str, values: Tensor) -> None:
    """Give each flight its part of ``values [n, ...]``."""
    decoder = values.split([len(chunk.positions) for chunk in chunks])
    for chunk, part in zip(chunks, decoder, strict=True):
        setattr(chunk, name, part)
