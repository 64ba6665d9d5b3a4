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

from .fetching import Fetcher
from .flight import Flight, known
from .runner import Runner


class RoutedBoundaries:
    """Of a routed model; the same two calls as :class:`~.boundaries.Boundaries`."""

    def __init__(self, runner: Runner, fetcher: Fetcher) -> None:
        self.runner, self.fetcher = runner, fetcher
        self.config = runner.parts.config
        self.model = runner.parts.model.model
        self.last_depth = runner.parts.num_depths - 1

    def enter(self, flights: Sequence[Flight]) -> None:
        """``flights`` come to the first recursion."""
        self._route(flights)

    def pass_block(self, flights: Sequence[Flight]) -> None:
        """The block has run: ``flight.states`` are what it made of ``flight.positions`` at ``flight.depth``."""
        for flight in flights:
            flight.states = self._gate(flight)
            flight.depth += 1
        ends = [flight for flight in flights if flight.depth > self.last_depth]
        for flight in ends:
            flight.depart(flight.positions, flight.states, self.last_depth)
            flight.positions = []
        self._route([flight for flight in flights if not flight.is_done])

    def _gate(self, flight: Flight) -> Tensor:
        entered, made, gates = known(flight.entered), flight.states, known(flight.gates)
        if self.config.router == "token_choice" and self.config.router_gate == "mor":
            # As published: recursions add up unweighted, and the last is weighted beside the first's input.
            is_last = (known(flight.choices) == flight.depth).unsqueeze(-1)
            return torch.where(is_last, gated(known(flight.first), made, gates, "mor"), made)
        return gated(entered, made, gates, self.config.router_gate)

    def _route(self, flights: Sequence[Flight]) -> None:
        """Have tokens go into the recursion that ``flights`` have come to, or leave. One fetch for all."""
        choose = self._choose_experts if self.config.router == "expert_choice" else self._choose_by_token
        by_depth: dict[int, list[Flight]] = {}
        for flight in flights:
            by_depth.setdefault(flight.depth, []).append(flight)
        taken = [choose(depth, group) for depth, group in by_depth.items()]
        order = [flight for group in by_depth.values() for flight in group]
        if not order:
            return
        if all(each is None for each in taken):
            for flight in order:
                self._take(flight, None)
            return
        whole = [
            torch.ones(sum(len(flight.positions) for flight in group), dtype=torch.bool, device=self.runner.device)
            if each is None
            else each
            for each, group in zip(taken, by_depth.values(), strict=True)
        ]
        answers = iter(self.fetcher.now(torch.cat(whole)))
        for flight in order:
            self._take(flight, [next(answers) for _ in flight.positions])

    def _choose_experts(self, depth: int, flights: Sequence[Flight]) -> Tensor | None:
        """Which tokens the router of ``depth`` takes, bool ``[n]``, None for all; notes their gates."""
        states = torch.cat([flight.states for flight in flights])
        router = self.model.routers[depth]
        logits = router(states)
        deciding = logits[:, 0]
        if self.model.auxiliary_routers is not None:
            deciding = self.model.auxiliary_routers[depth](states)[:, 0]
        _hand_out(flights, "gates", expert_gates(self.config, router, logits))
        threshold = inference_threshold(self.config, depth)
        if threshold is None:
            return None
        return choose_above(deciding, torch.ones_like(deciding, dtype=torch.bool), threshold)

    def _choose_by_token(self, depth: int, flights: Sequence[Flight]) -> Tensor | None:
        """Which tokens go as far as ``depth``, bool ``[n]``, None for all; notes their gates."""
        if depth == 0:
            states = torch.cat([flight.states for flight in flights])
            router = self.model.routers[0]
            choices, weights = depths_and_gates(self.config, router, router(states))
            _hand_out(flights, "choices", choices)
            _hand_out(flights, "weights", weights)
            for flight in flights:
                flight.first = flight.states
        choices = torch.cat([known(flight.choices) for flight in flights])
        weights = torch.cat([known(flight.weights) for flight in flights])
        _hand_out(flights, "gates", weights * (choices == depth))
        return None if depth == 0 else choices >= depth

    def _take(self, flight: Flight, taken: list[bool] | None) -> None:
        """Tokens of ``flight`` that are not ``taken`` leave; None takes all."""
        if taken is not None and not all(taken):
            outside = [number for number, goes in enumerate(taken) if not goes]
            inside = [number for number, goes in enumerate(taken) if goes]
            index = on_device(outside, flight.states.device, torch.long)
            positions = [flight.positions[number] for number in outside]
            flight.depart(positions, flight.states[index], flight.depth - 1)
            index = on_device(inside, flight.states.device, torch.long)
            flight.positions = [flight.positions[number] for number in inside]
            for name in ("states", "gates", "choices", "weights", "first"):
                held = getattr(flight, name)
                if held is not None:
                    setattr(flight, name, held[index])
        if flight.positions:
            flight.entered = flight.states
            flight.request.packed.setdefault(flight.depth, []).extend(flight.positions)


def _hand_out(flights: Sequence[Flight], name: str, values: Tensor) -> None:
    """Give each flight its part of ``values [n, ...]``."""
    parts = values.split([len(flight.positions) for flight in flights])
    for flight, part in zip(flights, parts, strict=True):
        setattr(flight, name, part)
