"""Early exit: after each recursion, every token continues or exits.

Prompt tokens always continue. A new token exits where its policy's confidence is above the threshold. Tokens that are
computed again after a preemption exit where they exited before. The engine's KV mode provides the keys and values of
the skipped depths:

- ``deferred``: the token waits, and runs them together with the next token of its request that gets there;
- ``copied``: they are projected from the state at the exit;
- ``latest``: they are those of the last depth that the token ran.

Shape legend: n tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling import ExitLimits, decide_exits
from recursify.modeling.recursive_columns import on_device
from recursify.modeling.recursive_policies import ExitContext

from .chunk import Chunk, known
from .host_sync import HostSync
from .layers.batch import TokenSpan
from .layers.kv_cache import copy_slots
from .layers.model_runner import ModelRunner
from .request import Request


class EarlyExitStage:
    """Stage between two recursions of a model without routers, in the KV mode ``kv``."""

    def __init__(self, runner: ModelRunner, kv: str, host_sync: HostSync) -> None:
        self.runner, self.kv, self.host_sync = runner, kv, host_sync
        self.last_depth = runner.decoder.num_depths - 1
        self.exits_run_coda = runner.decoder.exits_run_coda

    def enter(self, chunks: Sequence[Chunk]) -> None:
        """Prepare new ``chunks`` for the first recursion; all of their tokens run it."""
        for chunk in chunks:
            self._take_deferred(chunk)

    def pass_block(self, chunks: Sequence[Chunk]) -> None:
        """Let tokens exit after the block, and move the others to the next depth.

        ``chunk.states`` are the block's output at ``chunk.depth`` for ``chunk.positions``.
        """
        exiting = self._decide([chunk for chunk in chunks if chunk.is_new and chunk.depth < self.last_depth])
        for chunk in chunks:
            depth, skipping = chunk.depth, None
            if depth == self.last_depth:
                self._exit_last(chunk)
            elif exiting.get(chunk, False):
                chunk.exit_tokens(chunk.positions[-1:], chunk.states[-1:], depth)
                # Deferred tokens that caught up with the new token are deferred again.
                skipping, chunk.positions = (chunk.positions, chunk.states), []
            elif not chunk.is_new and chunk.stop > chunk.request.prompt_length:
                skipping = self._exit_again(chunk)
            if not chunk.is_done:
                chunk.depth = depth + 1
                chunk.exit_states = chunk.exit_logits = None  # of an exit that was not taken
                self._take_deferred(chunk)
            if skipping is not None:
                # After the tokens that continue have taken along those deferred earlier.
                self._skip(chunk.request, depth, *skipping)

    # --- Decisions -----------------------------------------------------------------------------------------------

    def _decide(self, chunks: Sequence[Chunk]) -> dict[Chunk, bool]:
        """Decide which new tokens exit here, with one device-to-host copy for those whose confidence matters."""
        limits = {chunk: self._limits(chunk) for chunk in chunks}
        decided = {chunk: bool(decide_exits(-math.inf, limits[chunk])) for chunk in chunks}
        groups: dict[object, list[Chunk]] = {}
        for chunk, is_exiting in decided.items():
            settings = chunk.request.settings
            if is_exiting or settings is None:
                continue
            policy = settings.policy
            if policy.needs_previous_logits or decide_exits(math.inf, limits[chunk]):
                groups.setdefault((chunk.depth, type(policy), policy.vocabulary), []).append(chunk)
        if groups:
            tests = [self._test(group, [limits[chunk] for chunk in group]) for group in groups.values()]
            decisions = self.host_sync.fetch(torch.cat(tests))
            tested = [chunk for group in groups.values() for chunk in group]
            decided.update(zip(tested, map(bool, decisions), strict=True))
        return decided

    def _limits(self, chunk: Chunk) -> ExitLimits:
        """Exit limits of the new token of ``chunk`` at its depth."""
        request, depth = chunk.request, chunk.depth
        params, settings = request.params, request.settings
        if params.forced_depths is not None:
            index = len(request.exit_depths) % len(params.forced_depths)
            return ExitLimits(depth, self.last_depth, forced_depth=params.forced_depths[index])
        last_depth = self.last_depth if params.max_depth is None else min(params.max_depth, self.last_depth)
        if settings is None:
            return ExitLimits(depth, last_depth)
        step = chunk.start - request.prompt_length
        return ExitLimits(
            depth,
            last_depth,
            settings.threshold_at(depth, self.last_depth, step, max(params.max_tokens, 1)),
            settings.min_depth,
            self._num_pending(chunk) if self.kv == "deferred" else 0,
            settings.max_pending,
        )

    def _num_pending(self, chunk: Chunk) -> int:
        """Number of tokens of the request, including this one, that have yet to run its deepest recursion."""
        return len(chunk.positions) + sum(len(positions) for positions, _ in chunk.request.deferred.values())

    def _test(self, chunks: Sequence[Chunk], limits: Sequence[ExitLimits]) -> Tensor:
        """Exit decisions, bool ``[n]``, of ``chunks`` at the same depth with the same kind of policy."""
        settings = chunks[0].request.settings
        assert settings is not None
        runner, depth, policy = self.runner, chunks[0].depth, settings.policy
        states = torch.stack([chunk.states[-1] for chunk in chunks])
        heads = getattr(runner.decoder.model, "exit_heads", None)
        compares = policy.needs_previous_logits and depth > 0
        previous = torch.stack([known(chunk.previous_logits) for chunk in chunks]) if compares else None

        def arrive() -> Tensor:
            spans = [TokenSpan(chunk.request, None, [chunk.stop - 1]) for chunk in chunks]
            return runner.coda(spans, states) if self.exits_run_coda else states

        context = ExitContext(
            depth,
            states,
            torch.stack([known(chunk.embedded if depth == 0 else chunk.entered) for chunk in chunks]),
            arrive=arrive,
            read=lambda exit_states, vocabulary: runner.compute_exit_logits(depth, exit_states, vocabulary),
            previous_logits=previous,
            test=None if heads is None else lambda: heads[depth].agreement(states),
            vocabulary=policy.vocabulary,
        )
        confidence = policy.confidence(context)
        exit_states, exit_logits = context.known("exit_states"), context.known("all_logits")
        for row, chunk in enumerate(chunks):
            chunk.exit_states = None if exit_states is None else exit_states[row]
            chunk.exit_logits = None if exit_logits is None else exit_logits[row]
            if policy.needs_previous_logits:
                chunk.previous_logits = context.logits[row]
        columns = on_device(list(zip(*limits, strict=True)), confidence.device, torch.float32)
        return decide_exits(confidence, ExitLimits(*columns))

    # --- Exits ---------------------------------------------------------------------------------------------------

    def _exit_last(self, chunk: Chunk) -> None:
        """Exit all tokens of ``chunk`` after the last recursion."""
        chunk.exit_tokens(chunk.positions, chunk.states, chunk.depth)
        if self.kv == "deferred":
            chunk.request.full_until = max(chunk.request.full_until, chunk.positions[-1] + 1)
        chunk.positions = []

    def _exit_again(self, chunk: Chunk) -> tuple[list[int], Tensor] | None:
        """Exit the tokens of ``chunk`` that exited here before a preemption.

        Returns positions and states ``[n, D]`` of all tokens that skip deeper recursions.
        """
        request, depth = chunk.request, chunk.depth
        exit_depths = [self._past_exit(request, position) for position in chunk.positions]
        exiting = [index for index, exit_depth in enumerate(exit_depths) if exit_depth == depth]
        if not exiting:
            return None
        positions, states = _select(chunk, exiting)
        chunk.exit_tokens(positions, states, depth)
        deeper = [index for index, exit_depth in enumerate(exit_depths) if exit_depth > depth]
        if self.kv == "deferred":
            # Tokens before one that continues go on with it, as they did before the preemption.
            stop = deeper[-1] + 1 if deeper else 0
            positions, states = chunk.positions[stop:], chunk.states[stop:]
            chunk.positions, chunk.states = chunk.positions[:stop], chunk.states[:stop]
        else:
            chunk.positions, chunk.states = _select(chunk, deeper)
        return positions, states

    def _past_exit(self, request: Request, position: int) -> int:
        """Depth after which the token at ``position`` exited when it was computed first."""
        index = position - request.prompt_length
        if index < 0 or position < request.full_until or index >= len(request.exit_depths):
            return self.last_depth
        return request.exit_depths[index]

    def _skip(self, request: Request, depth: int, positions: list[int], states: Tensor) -> None:
        """Provide keys and values of the depths that tokens skip after exiting at ``depth`` with ``states [n, D]``."""
        if not positions:
            return
        decoder = self.runner.decoder
        if self.kv == "deferred":
            if depth == request.params.max_depth:
                return  # no later token of the request goes deeper
            deferred, deferred_states = request.deferred.pop(depth + 1, ([], states[:0]))
            # The concatenation copies: a view would keep the states of all rows of the call alive.
            request.deferred[depth + 1] = [*deferred, *positions], torch.cat([deferred_states, states])
            return
        deeper = range(depth + 1, self.last_depth + 1)
        if self.kv == "copied":
            spans = [TokenSpan(request, skipped, positions) for skipped in deeper]
            self.runner.run(decoder.block, spans, states.repeat(len(spans), 1), only_writes=True)
        else:
            slots = [self.runner.kv_cache.slots(request, at, positions) for at in (depth, *deeper)]
            sources, *targets = on_device(slots, states.device, torch.long)
            for target in targets:
                copy_slots(decoder.block, sources, target)
        if not self.exits_run_coda:
            self.runner.run(decoder.coda, [TokenSpan(request, None, positions)], states, only_writes=True)

    def _take_deferred(self, chunk: Chunk) -> None:
        """Add the request's tokens that were deferred at ``chunk.depth`` to ``chunk``."""
        if chunk.is_new:
            chunk.entered = chunk.states[-1]
        deferred = chunk.request.deferred.pop(chunk.depth, None)
        if deferred is not None:
            positions, states = deferred
            chunk.positions = [*positions, *chunk.positions]
            chunk.states = torch.cat([states, chunk.states])


def _select(chunk: Chunk, indices: list[int]) -> tuple[list[int], Tensor]:
    """Positions and states of some tokens of a chunk."""
    index = on_device(indices, chunk.states.device, torch.long)
    return [chunk.positions[number] for number in indices], chunk.states[index]
