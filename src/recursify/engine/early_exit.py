"""What happens to tokens at the end of a recursion: they go on, or they leave.

Of a prompt's tokens all go on. A new token leaves where its policy says so. What is run again after a preemption leaves
where it left. Keys and values of the depths that it skips are then made by the engine's mode:

- ``deferred``: it waits, and runs them together with the next token of its request that goes so deep;
- ``copied``: they are projected from the state it leaves with;
- ``latest``: they are those of the last depth that it ran.

Shape legend: n tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling import ExitLimits, exits
from recursify.modeling.recursive_decoding import on_device
from recursify.modeling.recursive_policies import ExitContext

from .chunk import Chunk, known
from .host_sync import HostSync
from .layers.batch import TokenSpan
from .layers.kv_cache import copy_slots
from .layers.model_runner import ModelRunner
from .request import Request


class EarlyExitStage:
    """Of a model without routers."""

    def __init__(self, runner: ModelRunner, kv: str, host_sync: HostSync) -> None:
        self.runner, self.kv, self.host_sync = runner, kv, host_sync
        self.last_depth = runner.decoder.num_depths - 1
        self.through_coda = runner.decoder.exits_run_coda

    def enter(self, chunks: Sequence[Chunk]) -> None:
        """``flights`` come to the first recursion; all of their tokens run it."""
        for chunk in chunks:
            self._gather_waiting(chunk)

    def pass_block(self, chunks: Sequence[Chunk]) -> None:
        """The block has run: ``flight.states`` are what it made of ``flight.positions`` at ``flight.depth``."""
        leaving = self._decide([chunk for chunk in chunks if chunk.is_new and chunk.depth < self.last_depth])
        for chunk in chunks:
            depth, stay = chunk.depth, None
            if depth == self.last_depth:
                self._land(chunk)
            elif leaving.get(chunk, False):
                stay = self._leave(chunk)
            elif not chunk.is_new and chunk.stop > chunk.request.prompt_length:
                stay = self._leave_again(chunk)
            if not chunk.is_done:
                chunk.depth = depth + 1
                chunk.exit_states = chunk.exit_logits = None  # those of an exit that it did not take
                self._gather_waiting(chunk)
            if stay is not None:
                # After those that go on have taken along what waited before them.
                self._skip(chunk.request, depth, *stay)

    # --- Deciding ------------------------------------------------------------------------------------------------

    def _decide(self, chunks: Sequence[Chunk]) -> dict[Chunk, bool]:
        """Decide which new tokens exit here, with one device-to-host copy for those whose confidence matters."""
        limits = {chunk: self._limits(chunk) for chunk in chunks}
        decided = {chunk: bool(exits(-math.inf, limits[chunk])) for chunk in chunks}
        groups: dict[object, list[Chunk]] = {}
        for chunk, is_exiting in decided.items():
            settings = chunk.request.settings
            if is_exiting or settings is None:
                continue
            policy = settings.policy
            if policy.needs_previous_logits or exits(math.inf, limits[chunk]):
                groups.setdefault((chunk.depth, type(policy), policy.vocabulary), []).append(chunk)
        answers = [self._ask(group, [limits[chunk] for chunk in group]) for group in groups.values()]
        if answers:
            order = [chunk for group in groups.values() for chunk in group]
            decided.update(zip(order, map(bool, self.host_sync.fetch(torch.cat(answers))), strict=True))
        return decided

    def _limits(self, chunk: Chunk) -> ExitLimits:
        """The limits of the chunk's new token at its depth."""
        request, depth = chunk.request, chunk.depth
        params, settings = request.params, request.settings
        if params.forced_depths is not None:
            number = len(request.exit_depths) % len(params.forced_depths)
            return ExitLimits(depth, self.last_depth, forced_depth=params.forced_depths[number])
        last_depth = self.last_depth if params.max_depth is None else min(params.max_depth, self.last_depth)
        if settings is None:
            return ExitLimits(depth, last_depth)
        step = chunk.start - request.prompt_length
        return ExitLimits(
            depth,
            last_depth,
            settings.threshold_at(depth, self.last_depth, step, max(params.max_tokens, 1)),
            settings.min_depth,
            self._pending(chunk) if self.kv == "deferred" else 0,
            settings.max_pending,
        )

    def _pending(self, chunk: Chunk) -> int:
        """Tokens of the request, this one included, that have not run the last recursion and may have to.

        That is the last one that the request lets tokens run.
        """
        return len(chunk.positions) + sum(len(positions) for positions, _ in chunk.request.deferred.values())

    def _ask(self, chunks: Sequence[Chunk], limits: Sequence[ExitLimits]) -> Tensor:
        """Decide for new tokens at one depth with one kind of policy: bool ``[n]``."""
        settings = chunks[0].request.settings
        assert settings is not None
        runner, depth, policy = self.runner, chunks[0].depth, settings.policy
        states = torch.stack([chunk.states[-1] for chunk in chunks])
        heads = getattr(runner.decoder.model, "exit_heads", None)
        before = None
        if policy.needs_previous_logits and depth:
            before = torch.stack([known(chunk.previous_logits) for chunk in chunks])

        def arrive() -> Tensor:
            if not self.through_coda:
                return states
            return runner.coda([TokenSpan(chunk.request, None, [chunk.stop - 1]) for chunk in chunks], states)

        boundary = ExitContext(
            depth,
            states,
            torch.stack([known(chunk.embedded if depth == 0 else chunk.entered) for chunk in chunks]),
            arrive=arrive,
            read=lambda exit_states, vocabulary: runner.compute_exit_logits(depth, exit_states, vocabulary),
            previous_logits=before,
            test=None if heads is None else lambda: heads[depth].agreement(states),
            vocabulary=policy.vocabulary,
        )
        confidence = policy.confidence(boundary)
        for number, chunk in enumerate(chunks):
            for name in ("exit_states", "all_logits"):
                rows = boundary.known(name)
                setattr(chunk, name.replace("all", "exit"), None if rows is None else rows[number])
            if policy.needs_previous_logits:
                chunk.previous_logits = boundary.logits[number]
        by_name = on_device(list(zip(*limits, strict=True)), confidence.device, torch.float32)
        return exits(confidence, ExitLimits(*by_name))

    # --- Moving --------------------------------------------------------------------------------------------------

    def _land(self, chunk: Chunk) -> None:
        """All of ``flight`` has run the last recursion."""
        chunk.exit_tokens(chunk.positions, chunk.states, chunk.depth)
        if self.kv == "deferred":
            chunk.request.full_until = max(chunk.request.full_until, chunk.positions[-1] + 1)
        chunk.positions = []

    def _leave(self, chunk: Chunk) -> tuple[list[int], Tensor]:
        """The new token of ``flight`` leaves; what came along to be caught up stays behind with it.

        Returns:
            Positions and states ``[n, D]`` of all that skips deeper recursions.
        """
        chunk.exit_tokens(chunk.positions[-1:], chunk.states[-1:], chunk.depth)
        stay = chunk.positions, chunk.states
        chunk.positions = []
        return stay

    def _leave_again(self, chunk: Chunk) -> tuple[list[int], Tensor] | None:
        """Tokens of ``flight`` that left here before leave again; returns what :meth:`_leave` does."""
        request, depth = chunk.request, chunk.depth
        last = [self._left_after(request, position) for position in chunk.positions]
        leaving = [number for number, at in enumerate(last) if at == depth]
        if not leaving:
            return None
        positions, states = _pick(chunk, leaving)
        chunk.exit_tokens(positions, states, depth)
        deeper = [number for number, at in enumerate(last) if at > depth]
        if self.kv == "deferred":
            # What lies between tokens that go deeper goes with them, as it did then.
            stop = deeper[-1] + 1 if deeper else 0
            positions, states = chunk.positions[stop:], chunk.states[stop:]
            chunk.positions, chunk.states = chunk.positions[:stop], chunk.states[:stop]
        else:
            chunk.positions, chunk.states = _pick(chunk, deeper)
        return positions, states

    def _left_after(self, request: Request, position: int) -> int:
        """The depth after which the token at ``position`` left when it was first run."""
        number = position - request.prompt_length
        if number < 0 or position < request.full_until or number >= len(request.exit_depths):
            return self.last_depth
        return request.exit_depths[number]

    def _skip(self, request: Request, depth: int, positions: list[int], states: Tensor) -> None:
        """See to keys and values of the recursions that tokens skip, which left ``depth`` with ``states [n, D]``."""
        if not positions:
            return
        decoder = self.runner.decoder
        if self.kv == "deferred":
            if depth == request.params.max_depth:
                return  # no later token will go deeper either
            before, held = request.deferred.pop(depth + 1, ([], states[:0]))
            # A copy: these are a part of all rows of the call, which would be kept as long.
            request.deferred[depth + 1] = [*before, *positions], torch.cat([held, states])
            return
        deeper = range(depth + 1, self.last_depth + 1)
        if self.kv == "copied":
            runs = [TokenSpan(request, other, positions) for other in deeper]
            self.runner.write_only(decoder.block, runs, states.repeat(len(runs), 1))
        else:
            slots = [self.runner.kv_cache.slots(request, other, positions) for other in (depth, *deeper)]
            sources, *targets = on_device(slots, states.device, torch.long)
            for target in targets:
                copy_slots(decoder.block, sources, target)
        if not self.through_coda:
            self.runner.write_only(decoder.coda, [TokenSpan(request, None, positions)], states)

    def _gather_waiting(self, chunk: Chunk) -> None:
        """``flight`` comes to ``flight.depth``, and takes along what waits there."""
        if chunk.is_new:
            chunk.entered = chunk.states[-1]
        waiting = chunk.request.deferred.pop(chunk.depth, None)
        if waiting is not None:
            chunk.positions = [*waiting[0], *chunk.positions]
            chunk.states = torch.cat([waiting[1], chunk.states])


def _pick(chunk: Chunk, numbers: list[int]) -> tuple[list[int], Tensor]:
    """Positions and states of some of a flight's tokens."""
    index = on_device(numbers, chunk.states.device, torch.long)
    return [chunk.positions[number] for number in numbers], chunk.states[index]
