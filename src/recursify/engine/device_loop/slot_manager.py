"""Requests that live on the device: the host hands them over, and reads what they have said now and then.

A request is taken in when its next token is to begin, and stays until it has ended or its pages are taken from it. What
cannot be decided on the device runs in the engine's own iterations, beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import torch

from recursify.engine.layers.model_runner import ModelRunner
from recursify.engine.request import Request
from recursify.engine.scheduler import Scheduler
from recursify.kernels.dispatch import Implementation
from recursify.modeling.recursive_decoding import on_device
from recursify.modeling.recursive_policies import Confidence, Entropy, ExitPolicy

from .cuda_graphs import CudaGraphs
from .loop import MOST_ENDS, MOST_FORCED, MOST_PENDING, DeviceLoop, LoopShape, SlotSettings

ROOM = 1.25
"""Where tokens leave early, prelude and coda take so many times the rows that they have on average."""

FEW = 4
"""Up to so many slots the host asks after every recursion whether any token leaves, or the coda would run for none."""


class SlotManager:
    """The host's side of a :class:`~.device_loop.DeviceLoop`.

    Args:
        runner: The model and its pages.
        kv: Where keys and values of skipped depths come from.
        scheduler: Whose requests these are.
        eos: Tokens that end a text.
        num_device_steps: Iterations at most between two looks at what was said.
        implementation: Of the kernels.

    Attributes:
        requests: By slot.
        num_syncs: How often the host has waited for the device.
        tally: As :class:`~.device_loop.DeviceLoop` counts, when the host looked last.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv: str,
        scheduler: Scheduler,
        eos: Iterable[int],
        num_device_steps: int,
        implementation: Implementation,
    ) -> None:
        count = scheduler.max_num_seqs
        self.runner, self.scheduler, self.num_device_steps = runner, scheduler, num_device_steps
        self.num_syncs = 0
        self.loop = DeviceLoop(runner, kv, count, num_device_steps, implementation)
        # PyTorch's forms of some kernels ask the device how much there is to do, and some RoPE how long a text is.
        waits = implementation != "triton" or runner.decoder.rotates_by_length
        self.graphs = CudaGraphs(runner.device, captures=not waits)
        self.requests: list[Request | None] = [None] * count
        self._no_ends = torch.full_like(self.loop.ends, -1)
        self._ends = self._no_ends.clone()
        for number, token in enumerate(sorted(eos)[:MOST_ENDS]):
            self._ends[number] = token
        slots, pages = self.loop.settings.tables.shape
        pin = runner.device.type == "cuda"
        said = self.loop.most_said
        self._settings = SlotSettings.empty(slots, pages, runner.decoder.num_depths, said, "cpu", pin=pin)
        self._pages_sent = [0] * count
        self._num_read = 0
        self.tally = [0, 0, 0]
        self._depths = [0] * (count + 1)

    # --- Coming and going ----------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        return sum(request is not None for request in self.requests)

    @property
    def depths(self) -> list[int]:
        """The recursion that each resident's token was in when the host looked last."""
        slots = zip(self._depths, self.requests, strict=False)
        return [
            depth for depth, request in slots if request is not None and request.id in self.scheduler.device_requests
        ]

    def can_admit(self, request: Request) -> bool:
        """Whether the next token of ``request`` can run here, and all after it."""
        params, settings, decoder = request.params, request.settings, self.runner.decoder
        if params.logprobs is not None or None not in self.requests:
            return False
        if sum(len(positions) for positions, _ in request.deferred.values()) > MOST_PENDING:
            return False
        if params.may_exit_early and not (decoder.exits_run_coda and decoder.exits_share_head):
            return False
        along = self._brings_along(request)
        if along is None or along > MOST_PENDING + 1 or len(params.forced_depths or ()) > MOST_FORCED:
            return False
        if settings is None:
            return True
        policy = settings.policy
        is_read = type(policy) in (Confidence, Entropy) and policy.vocabulary is None
        if policy.needs_previous_logits or (policy.reads_logits and not is_read):
            return False
        if settings.decay:
            return False
        return self._policy() in (None, _kind_of(policy))

    def _brings_along(self, request: Request) -> int | None:
        """How many tokens of ``request`` may run a recursion together, 1 at least; None if there is no end to that."""
        params = request.params
        if not self.loop.catches_up:
            return 1
        if request.settings is not None:
            return request.settings.max_pending + 1
        if params.forced_depths is None:
            return 1
        full = [number for number, depth in enumerate(params.forced_depths) if depth >= self.loop.last]
        again = [number + len(params.forced_depths) for number in full[:1]]  # they are taken in turn
        return max((after - before for before, after in pairwise([*full, *again])), default=None)

    def _policy(self) -> ExitPolicy | None:
        """That residents have, all of them the same but for its thresholds."""
        settings = (request.settings for request in self.requests if request is not None)
        return next((_kind_of(each.policy) for each in settings if each is not None), None)

    def admit(self, request: Request) -> None:
        """Have the next token of ``request``, which :meth:`can_admit` says yes to, begin here."""
        slot = self.requests.index(None)
        self.requests[slot] = request
        self._pages_sent[slot] = 0
        self._write_settings(slot, request)
        loop, device, position = self.loop, self.runner.device, request.computed
        done = [position]
        for depth in range(1, self.runner.decoder.num_depths):
            waiting = request.deferred.get(depth)
            done.append(waiting[0][0] if waiting else done[-1])
        numbers = on_device([request.tokens[position], position, len(request.exit_depths), *done], device, torch.long)
        loop.slots.token[slot], loop.slots.position[slot], loop.number[slot] = numbers[:3]
        loop.done[slot] = numbers[3:]
        for flags in (loop.slots.depth, loop.leaving, loop.slots.finished):
            flags[slot] = 0
        loop.fresh[slot] = True
        for positions, states in request.deferred.values():
            places = on_device([position % loop.width for position in positions], device, torch.long)
            loop.held[slot, places] = states
        request.deferred.clear()

    def _write_settings(self, slot: int, request: Request) -> None:
        """What the device must know of ``request``."""
        params, settings, last = request.params, request.settings, self.loop.last
        held, forced = self._settings, params.forced_depths or ()
        held.limits[slot] = request.prompt_length + params.max_tokens - 1
        held.max_depth[slot] = last if params.max_depth is None else min(params.max_depth, last)
        held.max_pending[slot] = MOST_PENDING if settings is None else settings.max_pending
        held.num_forced[slot] = len(forced)
        held.forced[slot, : len(forced)] = torch.tensor(forced, dtype=torch.long)
        held.thresholds[slot] = math.inf
        if settings is not None:
            for depth in range(settings.min_depth, last):
                held.thresholds[slot, depth] = settings.threshold_at(depth, last, 0, 1)
        held.temperature[slot], held.top_p[slot] = params.temperature, params.top_p
        held.top_k[slot] = params.top_k or 0

    def release_ended(self) -> None:
        """Slots of requests that have ended, or have lost their pages, are free."""
        for slot, request in enumerate(self.requests):
            if request is not None and request.id not in self.scheduler.device_requests:
                self.requests[slot] = None

    # --- Running -------------------------------------------------------------------------------------------------

    def run(self, times: int, recursions: float) -> int:
        """So many iterations, or a few more; returns how many. :meth:`read_tokens` has what comes of them.

        Where tokens leave early each iteration is enter, block, exit. Where none does, all slots go through the
        recursions together, enter before the first and exit after the last: prelude, coda and readout cost as much for
        few rows as for many.

        Args:
            times: From 1 to ``num_device_steps``.
            recursions: That tokens run in the mean, as far as is known.
        """
        self.release_ended()
        for request in list(self.requests):
            if request is not None and request.id in self.scheduler.device_requests:
                self._provide(request, times)
        self.release_ended()
        if not self.num_requests:
            return 0
        self._close_gaps()
        self._send_settings()
        shape = self._shape(recursions)
        self._choose_policy(shape)
        if not shape.leaves:
            depths = self.loop.last + 1
            rounds = -(-times // depths)
            for _ in range(rounds):
                self._call("enter", shape)
                self._call("block", shape, depths)
                self._call("exit", shape)
            return rounds * depths
        may_enter = True  # who was let in, or has got a page to go on
        for _ in range(times):
            if may_enter:
                self._call("enter", shape)
            self._call("block", shape)
            may_enter = shape.slots > FEW or self._is_any_leaving(shape)
            if may_enter:
                self._call("exit", shape)
        return times

    def _choose_policy(self, shape: LoopShape) -> None:
        """The policy of those who are here, which differs from the last one when its kind has come or gone."""
        policy = self._policy()
        if policy != self.loop.policy:
            # Who has left and waits for the coda is read out as it left: not all policies read tokens at that time.
            for _ in range(shape.slots):  # one of them at least goes each time
                if not self._is_any_leaving(shape):
                    break
                self._call("exit", shape)
        self.loop.policy = policy

    def _is_any_leaving(self, shape: LoopShape) -> bool:
        """Ask the device, where few slots make it likely that none is."""
        self.num_syncs += 1
        return bool(self.loop.leaving[: shape.slots].any())

    def _call(self, part: str, shape: LoopShape, times: int = 1) -> None:
        """A part of an iteration, so many times."""
        self.graphs.run((part, shape, self.loop.policy), partial(getattr(self.loop, part), shape), times)

    def _provide(self, request: Request, times: int) -> None:
        """Pages for the token under way and those that may follow it, or at least for itself."""
        left = request.prompt_length + request.params.max_tokens - request.computed
        if not self.runner.kv_cache.reserve(request, min(left, times + 1)):
            self.scheduler.make_room(request, 1)

    def _close_gaps(self) -> None:
        """Move requests to the first slots, where that makes fewer slots do."""
        count = self.num_requests
        if self._bucket(self._highest()) == self._bucket(count):
            return
        sources = [slot for slot, request in enumerate(self.requests) if request is not None and slot >= count]
        targets = [slot for slot, request in enumerate(self.requests[:count]) if request is None]
        loop = self.loop
        here, there = on_device([sources, targets], self.runner.device, torch.long)
        on_the_device = [*vars(loop.slots).values(), loop.fresh, loop.leaving, loop.number, loop.done, loop.held]
        for held in (*on_the_device, loop.coda_from, loop.embedded, loop.entered, loop.choice):
            held[there] = held[here]
        for held in vars(self._settings).values():
            held[targets] = held[sources]
        for source, target in zip(sources, targets, strict=True):
            self.requests[target], self.requests[source] = self.requests[source], None
            self._pages_sent[target] = self._pages_sent[source]

    def _highest(self) -> int:
        """Slots up to the last one in use."""
        return max(slot + 1 for slot, request in enumerate(self.requests) if request is not None)

    def _bucket(self, count: int) -> int:
        """Slots of an iteration that has ``count``: a power of 2, so that there are few different ones."""
        return min(len(self.requests), 1 << (count - 1).bit_length())

    def _send_settings(self) -> None:
        """Tell the device what slots are to do."""
        for slot, request in enumerate(self.requests):
            if request is not None and len(request.tables[0]) != self._pages_sent[slot]:
                table = request.tables[0]
                self._pages_sent[slot] = len(table)
                self._settings.tables[slot, : len(table)] = torch.tensor(table, dtype=torch.int32)
                self._settings.tables[slot, len(table) :] = -1
        drawn = {slot: each for slot, each in enumerate(self.requests) if each is not None and each.params.temperature}
        if drawn:
            numbers = [request.next_draws(self.loop.most_said) for request in drawn.values()]
            self._settings.draws[list(drawn)] = torch.tensor(numbers, dtype=torch.float64)
        self.loop.said.zero_()
        for field in fields(SlotSettings):
            getattr(self.loop.settings, field.name).copy_(getattr(self._settings, field.name), non_blocking=True)
        here = [request is not None for request in self.requests]
        self.loop.slots.active[:-1] = on_device(here, self.runner.device, torch.bool)
        # A slot may have lost its request when its token waited for the coda, whose keys are another's place by now.
        self.loop.leaving.logical_and_(self.loop.slots.active)
        ignores = any(request is not None and request.params.ignore_eos for request in self.requests)
        self.loop.ends.copy_(self._no_ends if ignores else self._ends)

    def _shape(self, recursions: float) -> LoopShape:
        """The smallest that has room for the residents."""
        slots, loop = self._bucket(self._highest()), self.loop
        requests = [request for request in self.requests if request is not None]
        leaves = loop.last > 0 and any(request.params.may_exit_early for request in requests)
        most = max(self._brings_along(request) or 1 for request in requests)
        # Room for the tokens of half of the slots that come along, or for all of one.
        along = loop.room_for(most)
        rows = max(slots + slots // 2, along) if along else slots
        once = slots
        if leaves and slots > FEW:
            # Of an iteration's tokens so many leave; in eighths, so that there are few different shapes.
            once = math.ceil(slots * min(1.0, math.ceil(8 * ROOM / recursions) / 8))
        drawn = [request.params.temperature > 0 for request in requests]
        exits = max(once, along)
        return LoopShape(slots, once, rows, exits, leaves, samples=any(drawn), reads=not all(drawn))

    def discard_unread(self) -> None:
        """After an error: what has been said since the last look is lost, and all begin again."""
        for request in self.requests:
            if request is not None and request.id in self.scheduler.device_requests:
                self.scheduler.preempt(request)
        self.release_ended()
        self._num_read = int(self.loop.ring.counts[0])

    def read_tokens(self) -> list[tuple[Request, int, int]]:
        """What has been said: requests, tokens, and the depths that those were read after.

        A token after the one that ended a text may be among it. The host waits for the device here.
        """
        self.num_syncs += 1
        loop = self.loop
        ring = loop.ring.entries.flatten().long()
        numbers = torch.cat([ring, loop.ring.counts, loop.tally, loop.slots.depth]).tolist()
        size, capacity = len(ring), len(loop.ring.entries)
        written, _, *rest = numbers[size:]
        self.tally, self._depths = rest[:3], rest[3:]
        said = []
        for entry in range(self._num_read, written):
            at = entry % capacity * 4
            slot, token, depth, _ = numbers[at : at + 4]
            request = self.requests[slot]
            assert request is not None
            said.append((request, token, depth))
            if request.params.temperature > 0:
                request.use_draw()
        self._num_read = written
        return said


def _kind_of(policy: ExitPolicy) -> ExitPolicy:
    """``policy`` without its thresholds, which slots have each their own of."""
    return replace(policy, threshold=policy.default)
