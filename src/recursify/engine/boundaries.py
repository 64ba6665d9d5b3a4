"""What happens to tokens at the end of a recursion: they go on, or they leave.

Of a prompt's tokens all go on. A new token leaves where its policy says so. What is run again after a preemption leaves
where it left. Keys and values of the depths that it skips are then made by the engine's mode:

- ``deferred``: it waits, and runs them together with the next token of its request that goes so deep;
- ``copied``: they are projected from the state it leaves with;
- ``latest``: they are those of the last depth that it ran.

Shape legend: n tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling import ExitSettings
from recursify.modeling.recursive_decoding import on_device
from recursify.modeling.recursive_policies import Boundary

from .fetching import Fetcher
from .flight import Flight, known
from .kv_pages import copy_slots
from .request import Request
from .rows import Run
from .runner import Runner


class Boundaries:
    """Of a model without routers."""

    def __init__(self, runner: Runner, kv: str, fetcher: Fetcher) -> None:
        self.runner, self.kv, self.fetcher = runner, kv, fetcher
        self.last_depth = runner.parts.num_depths - 1
        self.through_coda = runner.parts.exits_run_coda

    def enter(self, flights: Sequence[Flight]) -> None:
        """``flights`` come to the first recursion; all of their tokens run it."""
        for flight in flights:
            self._gather_waiting(flight)

    def pass_block(self, flights: Sequence[Flight]) -> None:
        """The block has run: ``flight.states`` are what it made of ``flight.positions`` at ``flight.depth``."""
        leaving = self._decide([flight for flight in flights if flight.is_new and flight.depth < self.last_depth])
        for flight in flights:
            depth, stay = flight.depth, None
            if depth == self.last_depth:
                self._land(flight)
            elif leaving.get(flight, False):
                stay = self._leave(flight)
            elif not flight.is_new and flight.stop > flight.request.prompt_length:
                stay = self._leave_again(flight)
            if not flight.is_done:
                flight.depth = depth + 1
                flight.exit_states = flight.exit_logits = None  # those of an exit that it did not take
                self._gather_waiting(flight)
            if stay is not None:
                # After those that go on have taken along what waited before them.
                self._skip(flight.request, depth, *stay)

    # --- Deciding ------------------------------------------------------------------------------------------------

    def _decide(self, flights: Sequence[Flight]) -> dict[Flight, bool]:
        """Which of the new tokens leave here. One fetch for all that have to be asked."""
        decided = {flight: self._is_sure(flight) for flight in flights}
        asked = [flight for flight, sure in decided.items() if sure is None]
        groups: dict[object, list[Flight]] = {}
        for flight in asked:
            policy = self._settings(flight).policy
            groups.setdefault((flight.depth, type(policy), policy.vocabulary), []).append(flight)
        answers = [self._ask(group) for group in groups.values()]
        if answers:
            said = self.fetcher.now(torch.cat(answers))
            order = [flight for group in groups.values() for flight in group]
            decided.update(zip(order, said, strict=True))
        return {flight: bool(leaves) for flight, leaves in decided.items()}

    def _is_sure(self, flight: Flight) -> bool | None:
        """Whether the token leaves, where that does not depend on its states; None where it does."""
        request, depth = flight.request, flight.depth
        params, settings = request.params, request.settings
        if params.forced_depths is not None:
            number = len(request.left)
            return params.forced_depths[number % len(params.forced_depths)] <= depth
        if params.max_depth is not None and depth >= params.max_depth:
            return True
        if settings is None:
            return False
        if settings.policy.needs_previous_logits:
            return None
        return False if self._is_barred(flight) else None

    @staticmethod
    def _settings(flight: Flight) -> ExitSettings:
        """Of a flight that is asked."""
        settings = flight.request.settings
        assert settings is not None
        return settings

    def _is_barred(self, flight: Flight) -> bool:
        settings = self._settings(flight)
        if flight.depth < settings.min_depth:
            return True
        return self.kv == "deferred" and self._pending(flight) > settings.max_pending

    def _pending(self, flight: Flight) -> int:
        """Tokens of the request, this one included, that have not run the last recursion and may have to.

        That is the last one that the request lets tokens run.
        """
        return len(flight.positions) + sum(len(positions) for positions, _ in flight.request.waiting.values())

    def _ask(self, flights: Sequence[Flight]) -> Tensor:
        """Which of ``flights``, which have the same kind of policy at the same depth, leave: bool ``[n]``."""
        runner, depth, policy = self.runner, flights[0].depth, self._settings(flights[0]).policy
        states = torch.stack([flight.states[-1] for flight in flights])
        heads = getattr(runner.parts.model, "exit_heads", None)
        before = None
        if policy.needs_previous_logits and depth:
            before = torch.stack([known(flight.previous_logits) for flight in flights])

        def arrive() -> Tensor:
            if not self.through_coda:
                return states
            return runner.coda([Run(flight.request, None, [flight.stop - 1]) for flight in flights], states)

        boundary = Boundary(
            depth,
            states,
            torch.stack([known(flight.embedded if depth == 0 else flight.entered) for flight in flights]),
            arrive=arrive,
            read=lambda exit_states, vocabulary: runner.read_exit(depth, exit_states, vocabulary),
            previous_logits=before,
            test=None if heads is None else lambda: heads[depth].agreement(states),
            vocabulary=policy.vocabulary,
        )
        confidence = policy.confidence(boundary)
        thresholds = [self._threshold(flight) for flight in flights]
        for number, flight in enumerate(flights):
            for name in ("exit_states", "all_logits"):
                rows = boundary.known(name)
                setattr(flight, name.replace("all", "exit"), None if rows is None else rows[number])
            if policy.needs_previous_logits:
                flight.previous_logits = boundary.logits[number]
        return confidence > on_device(thresholds, confidence.device, confidence.dtype)

    def _threshold(self, flight: Flight) -> float:
        if self._is_barred(flight):
            return float("inf")
        request = flight.request
        step = flight.start - request.prompt_length
        return self._settings(flight).threshold_at(
            flight.depth, self.last_depth, step, max(request.params.max_tokens, 1)
        )

    # --- Moving --------------------------------------------------------------------------------------------------

    def _land(self, flight: Flight) -> None:
        """All of ``flight`` has run the last recursion."""
        flight.depart(flight.positions, flight.states, flight.depth)
        if self.kv == "deferred":
            flight.request.full_until = max(flight.request.full_until, flight.positions[-1] + 1)
        flight.positions = []

    def _leave(self, flight: Flight) -> tuple[list[int], Tensor]:
        """The new token of ``flight`` leaves; what came along to be caught up stays behind with it.

        Returns:
            Positions and states ``[n, D]`` of all that skips deeper recursions.
        """
        flight.depart(flight.positions[-1:], flight.states[-1:], flight.depth)
        stay = flight.positions, flight.states
        flight.positions = []
        return stay

    def _leave_again(self, flight: Flight) -> tuple[list[int], Tensor] | None:
        """Tokens of ``flight`` that left here before leave again; returns what :meth:`_leave` does."""
        request, depth = flight.request, flight.depth
        last = [self._left_after(request, position) for position in flight.positions]
        leaving = [number for number, at in enumerate(last) if at == depth]
        if not leaving:
            return None
        positions, states = _pick(flight, leaving)
        flight.depart(positions, states, depth)
        deeper = [number for number, at in enumerate(last) if at > depth]
        if self.kv == "deferred":
            # What lies between tokens that go deeper goes with them, as it did then.
            stop = deeper[-1] + 1 if deeper else 0
            positions, states = flight.positions[stop:], flight.states[stop:]
            flight.positions, flight.states = flight.positions[:stop], flight.states[:stop]
        else:
            flight.positions, flight.states = _pick(flight, deeper)
        return positions, states

    def _left_after(self, request: Request, position: int) -> int:
        """The depth after which the token at ``position`` left when it was first run."""
        number = position - request.prompt_length
        if number < 0 or position < request.full_until or number >= len(request.left):
            return self.last_depth
        return request.left[number]

    def _skip(self, request: Request, depth: int, positions: list[int], states: Tensor) -> None:
        """See to keys and values of the recursions that tokens skip, which left ``depth`` with ``states [n, D]``."""
        if not positions:
            return
        parts = self.runner.parts
        if self.kv == "deferred":
            if depth == request.params.max_depth:
                return  # no later token will go deeper either
            before, held = request.waiting.pop(depth + 1, ([], states[:0]))
            # A copy: these are a part of all rows of the call, which would be kept as long.
            request.waiting[depth + 1] = [*before, *positions], torch.cat([held, states])
            return
        deeper = range(depth + 1, self.last_depth + 1)
        if self.kv == "copied":
            runs = [Run(request, other, positions) for other in deeper]
            self.runner.write_only(parts.block, runs, states.repeat(len(runs), 1))
        else:
            slots = [self.runner.pages.slots(request, other, positions) for other in (depth, *deeper)]
            sources, *targets = on_device(slots, states.device, torch.long)
            for target in targets:
                copy_slots(parts.block, sources, target)
        if not self.through_coda:
            self.runner.write_only(parts.coda, [Run(request, None, positions)], states)

    def _gather_waiting(self, flight: Flight) -> None:
        """``flight`` comes to ``flight.depth``, and takes along what waits there."""
        if flight.is_new:
            flight.entered = flight.states[-1]
        waiting = flight.request.waiting.pop(flight.depth, None)
        if waiting is not None:
            flight.positions = [*waiting[0], *flight.positions]
            flight.states = torch.cat([waiting[1], flight.states])


def _pick(flight: Flight, numbers: list[int]) -> tuple[list[int], Tensor]:
    """Positions and states of some of a flight's tokens."""
    index = on_device(numbers, flight.states.device, torch.long)
    return [flight.positions[number] for number in numbers], flight.states[index]
