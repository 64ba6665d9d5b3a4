"""Host side of the device loop: admits requests to slots, and reads their tokens every few iterations.

A request is admitted when its next token begins, and stays until it ends or loses its pages. Requests that need
decisions which the device cannot make run alongside, in the engine's own iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from recursify.engine.host_sync import HostSync
from recursify.engine.layers.model_runner import ModelRunner
from recursify.engine.request import Request
from recursify.engine.scheduler import Scheduler
from recursify.kernels.dispatch import Implementation
from recursify.modeling.recursive_columns import on_device
from recursify.modeling.recursive_policies import Confidence, Entropy, ExitPolicy

from .cuda_graphs import CudaGraphs
from .loop import DeviceLoop
from .slots import MAX_EOS_TOKENS, MAX_FORCED_DEPTHS, MAX_PENDING, LoopCounters, LoopShape, SlotSettings

HEADROOM = 1.25
"""Rows of prelude and coda relative to the expected number of tokens that exit per iteration."""

SYNC_SLOTS = 4
"""Number of slots up to which the host syncs after every recursion, to skip coda calls without tokens."""


class SlotManager:
    """Host side of a :class:`~.loop.DeviceLoop`.

    Attributes:
        requests: Request of each slot, or None.
        graphs: CUDA graphs of the loop.
        counters: Counters of the loop as of the last read.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv: str,
        scheduler: Scheduler,
        eos: Iterable[int],
        host_sync: HostSync,
        num_device_steps: int,
        implementation: Implementation,
    ) -> None:
        count, device = scheduler.max_num_seqs, runner.device
        self.runner, self.scheduler, self.host_sync, self.num_device_steps = (
            runner,
            scheduler,
            host_sync,
            num_device_steps,
        )
        self.loop = DeviceLoop(runner, kv, count, num_device_steps, implementation)
        # The references of some kernels sync with the device.
        self.graphs = CudaGraphs(device, captures=implementation == "triton")
        self.requests: list[Request | None] = [None] * count
        self._no_eos = torch.full_like(self.loop.eos_tokens, -1)
        ids = sorted(eos)[:MAX_EOS_TOKENS]
        self._eos = on_device(ids + [-1] * (MAX_EOS_TOKENS - len(ids)), device)
        slots, pages = self.loop.settings.block_tables.shape
        self._settings = SlotSettings(
            slots, pages, runner.decoder.num_depths, self.loop.tokens_per_sync, "cpu", pin=device.type == "cuda"
        )
        self._num_pages = [0] * count
        self._num_read = 0
        self._depths = [0] * (count + 1)
        self.counters = LoopCounters()

    # --- Admission -----------------------------------------------------------------------------------------------

    def _is_on_device(self, request: Request | None) -> bool:
        """True if the scheduler has ``request`` on the device: it has not ended or been preempted."""
        return request is not None and request.id in self.scheduler.device_requests

    @property
    def num_requests(self) -> int:
        return len(self._admitted())

    def _admitted(self) -> list[Request]:
        return [request for request in self.requests if request is not None]

    @property
    def depths(self) -> list[int]:
        """Depth of each request's token as of the last read."""
        slots = zip(self._depths, self.requests, strict=False)
        return [depth for depth, request in slots if self._is_on_device(request)]

    def can_admit(self, request: Request) -> bool:
        """True if a slot is free and the device can make all decisions for ``request``."""
        params, settings, decoder = request.params, request.settings, self.runner.decoder
        if params.logprobs is not None or request.changes_logits or None not in self.requests:
            return False
        if sum(len(positions) for positions, _ in request.deferred.values()) > MAX_PENDING:
            return False
        if params.may_exit_early and not (decoder.exits_run_coda and decoder.exits_share_head):
            return False
        rows = self._max_rows(request)
        if rows is None or rows > MAX_PENDING + 1 or len(params.forced_depths or ()) > MAX_FORCED_DEPTHS:
            return False
        if settings is None:
            return True
        policy = settings.policy
        has_statistics = type(policy) in (Confidence, Entropy) and policy.vocabulary is None
        if policy.needs_previous_logits or (policy.reads_logits and not has_statistics) or settings.decay:
            return False
        return self._policy() in (None, _without_threshold(policy))

    def _max_rows(self, request: Request) -> int | None:
        """Maximum number of tokens of ``request`` that run one recursion together; None if unbounded."""
        params = request.params
        if not self.loop.defers:
            return 1
        if request.settings is not None:
            return request.settings.max_pending + 1
        if params.forced_depths is None:
            return 1
        full = [index for index, depth in enumerate(params.forced_depths) if depth >= self.loop.last_depth]
        next_cycle = [index + len(params.forced_depths) for index in full[:1]]
        return max((after - before for before, after in pairwise([*full, *next_cycle])), default=None)

    def _policy(self) -> ExitPolicy | None:
        """Exit policy of the admitted requests, without its thresholds: all of them have the same."""
        settings = (request.settings for request in self._admitted())
        return next((_without_threshold(entry.policy) for entry in settings if entry is not None), None)

    def admit(self, request: Request) -> None:
        """Give the next token of ``request`` a slot; :meth:`can_admit` must hold."""
        slot = self.requests.index(None)
        self.requests[slot] = request
        self._num_pages[slot] = 0
        self._write_settings(slot, request)
        loop, state, device, position = self.loop, self.loop.state, self.runner.device, request.computed
        first_pending = [position]
        for depth in range(1, self.runner.decoder.num_depths):
            deferred = request.deferred.get(depth)
            first_pending.append(deferred[0][0] if deferred else first_pending[-1])
        numbers = [request.tokens[position], position, len(request.exit_depths), *first_pending]
        on_gpu = on_device(numbers, device, torch.long)
        loop.slots.token[slot], loop.slots.position[slot], state.num_generated[slot] = on_gpu[:3]
        state.first_pending[slot] = on_gpu[3:]
        for tensor in (loop.slots.depth, state.is_exiting, loop.slots.finished):
            tensor[slot] = 0
        state.is_entering[slot] = True
        for positions, states in request.deferred.values():
            index = on_device([position % loop.width for position in positions], device, torch.long)
            state.states[slot, index] = states
        request.deferred.clear()

    def _write_settings(self, slot: int, request: Request) -> None:
        """Write the settings of ``request`` to the host's copy."""
        params, exit_settings, last_depth = request.params, request.settings, self.loop.last_depth
        settings, forced_depths = self._settings, params.forced_depths or ()
        settings.limits[slot] = request.prompt_length + params.max_tokens - 1
        settings.max_depth[slot] = last_depth if params.max_depth is None else min(params.max_depth, last_depth)
        settings.max_pending[slot] = MAX_PENDING if exit_settings is None else exit_settings.max_pending
        settings.num_forced[slot] = len(forced_depths)
        settings.forced_depths[slot, : len(forced_depths)] = torch.tensor(forced_depths, dtype=torch.long)
        settings.thresholds[slot] = math.inf
        if exit_settings is not None:
            for depth in range(exit_settings.min_depth, last_depth):
                settings.thresholds[slot, depth] = exit_settings.threshold_at(depth, last_depth, 0, 1)
        settings.temperature[slot], settings.top_p[slot] = params.temperature, params.top_p
        settings.top_k[slot], settings.min_p[slot] = params.top_k, params.min_p

    def release_ended(self) -> None:
        """Free the slots of requests that have ended or been preempted."""
        self.requests = [request if self._is_on_device(request) else None for request in self.requests]

    # --- Running -------------------------------------------------------------------------------------------------

    def run(self, num_iterations: int, mean_recursions: float) -> int:
        """Run about ``num_iterations`` iterations; returns their number. :meth:`read_tokens` returns the tokens.

        Where no token exits early, all slots go through the recursions together, with one ``enter`` before the first
        and one ``exit`` after the last: prelude, coda and head take as long for few rows as for many.

        Args:
            num_iterations: Number of iterations, from 1 to ``num_device_steps``.
            mean_recursions: Expected number of recursions per token.
        """
        self.release_ended()
        for request in self._admitted():
            if self._is_on_device(request):
                self._reserve_pages(request, num_iterations)
        self.release_ended()
        if not self.num_requests:
            return 0
        self._compact()
        self._upload_settings()
        shape = self._choose_shape(mean_recursions)
        self._switch_policy(shape)
        if not shape.exits_early:
            num_depths = self.loop.last_depth + 1
            num_rounds = -(-num_iterations // num_depths)
            for _ in range(num_rounds):
                self._run_part("enter", shape)
                self._run_part("block", shape, num_depths)
                self._run_part("exit", shape)
            return num_rounds * num_depths
        may_enter = True  # requests have been admitted, or have got pages
        for _ in range(num_iterations):
            if may_enter:
                self._run_part("enter", shape)
            self._run_part("block", shape)
            may_enter = shape.num_slots > SYNC_SLOTS or self._any_exiting(shape)
            if may_enter:
                self._run_part("exit", shape)
        return num_iterations

    def _switch_policy(self, shape: LoopShape) -> None:
        """Set the policy of the admitted requests."""
        policy = self._policy()
        if policy != self.loop.policy:
            # Tokens that wait for the coda get their logits under the old policy, which determines when they are read.
            for _ in range(shape.num_slots):  # at least one is done each time
                if not self._any_exiting(shape):
                    break
                self._run_part("exit", shape)
        self.loop.policy = policy

    def _any_exiting(self, shape: LoopShape) -> bool:
        """True if any token waits for the coda; syncs with the device."""
        self.host_sync.count += 1
        return bool(self.loop.state.is_exiting[shape.span].any())

    def _run_part(self, part: str, shape: LoopShape, times: int = 1) -> None:
        self.graphs.run((part, shape, self.loop.policy), partial(getattr(self.loop, part), shape), times)

    def _reserve_pages(self, request: Request, num_iterations: int) -> None:
        """Reserve pages for the current token and those of ``num_iterations``, or at least for the current one."""
        num_left = request.prompt_length + request.params.max_tokens - request.computed
        if not self.runner.kv_cache.reserve(request, min(num_left, num_iterations + 1)):
            self.scheduler.make_room(request, 1)

    def _compact(self) -> None:
        """Move requests to the first slots if fewer slots suffice."""
        count = self.num_requests
        if self._rounded(self._num_slots_used()) == self._rounded(count):
            return
        sources = [slot for slot, request in enumerate(self.requests) if request is not None and slot >= count]
        targets = [slot for slot, request in enumerate(self.requests[:count]) if request is None]
        source, target = on_device([sources, targets], self.runner.device, torch.long)
        for tensor in (*vars(self.loop.slots).values(), *vars(self.loop.state).values()):
            tensor[target] = tensor[source]
        for tensor in vars(self._settings).values():
            tensor[targets] = tensor[sources]
        for old, new in zip(sources, targets, strict=True):
            self.requests[new], self.requests[old] = self.requests[old], None
            self._num_pages[new] = self._num_pages[old]

    def _num_slots_used(self) -> int:
        """Number of slots up to the last one in use."""
        return max(slot + 1 for slot, request in enumerate(self.requests) if request is not None)

    def _rounded(self, count: int) -> int:
        """``count`` slots rounded up to a power of 2, to limit the number of shapes."""
        return min(len(self.requests), 1 << (count - 1).bit_length())

    def _upload_settings(self) -> None:
        """Copy settings, page tables and random numbers to the device."""
        loop, settings = self.loop, self._settings
        used = {slot: request for slot, request in enumerate(self.requests) if request is not None}
        for slot, request in used.items():
            table = request.tables[0]
            if len(table) != self._num_pages[slot]:
                self._num_pages[slot] = len(table)
                settings.block_tables[slot, : len(table)] = torch.tensor(table, dtype=torch.int32)
                settings.block_tables[slot, len(table) :] = -1
        sampled = [slot for slot, request in used.items() if request.params.temperature]
        if sampled:
            draws = [used[slot].next_draws(loop.tokens_per_sync) for slot in sampled]
            settings.draws[sampled] = torch.tensor(draws, dtype=torch.float64)
        loop.state.num_unread.zero_()
        for name, values in vars(settings).items():
            getattr(loop.settings, name).copy_(values, non_blocking=True)
        is_used = [request is not None for request in self.requests]
        loop.slots.active[:-1] = on_device(is_used, self.runner.device, torch.bool)
        # A slot may have lost its request while its token waited for the coda; its pages may be another request's.
        loop.state.is_exiting.logical_and_(loop.slots.active)
        ignores_eos = any(request.params.ignore_eos for request in used.values())
        loop.eos_tokens.copy_(self._no_eos if ignores_eos else self._eos)

    def _choose_shape(self, mean_recursions: float) -> LoopShape:
        """The smallest shape with room for the admitted requests."""
        slots, loop = self._rounded(self._num_slots_used()), self.loop
        requests = self._admitted()
        exits_early = loop.last_depth > 0 and any(request.params.may_exit_early for request in requests)
        # Room for the deferred tokens of half of the slots, or for all of one.
        deferred = loop.rows_for(max(self._max_rows(request) or 1 for request in requests))
        block_rows = max(slots + slots // 2, deferred) if deferred else slots
        once = slots
        if exits_early and slots > SYNC_SLOTS:
            # The expected fraction of tokens that exit per iteration, in eighths to limit the number of shapes.
            once = math.ceil(slots * min(1.0, math.ceil(8 * HEADROOM / mean_recursions) / 8))
        samples = [request.params.temperature > 0 for request in requests]
        return LoopShape(
            slots, once, block_rows, max(once, deferred), exits_early, samples=any(samples), is_greedy=not all(samples)
        )

    # --- Reading -------------------------------------------------------------------------------------------------

    def discard_unread(self) -> None:
        """Recover from an error: drop unread tokens and preempt all requests, which then generate them again."""
        for request in self._admitted():
            if self._is_on_device(request):
                self.scheduler.preempt(request)
        self.release_ended()
        self._num_read = int(self.loop.ring.counts[0])

    def read_tokens(self) -> list[tuple[Request, int, int]]:
        """New tokens in order: request, token id, exit depth. It syncs with the device.

        Tokens after the one that ended a sequence may be among them.
        """
        self.host_sync.count += 1
        loop = self.loop
        ring = loop.ring.entries.flatten().long()
        numbers = torch.cat([ring, loop.ring.counts, loop.counters, loop.slots.depth]).tolist()
        size, capacity = len(ring), len(loop.ring.entries)
        written, _, *rest = numbers[size:]
        self.counters, self._depths = LoopCounters(*rest[:3]), rest[3:]
        tokens = []
        for entry in range(self._num_read, written):
            start = entry % capacity * 4
            slot, token, depth, _ = numbers[start : start + 4]
            request = self.requests[slot]
            assert request is not None
            tokens.append((request, token, depth))
            if request.params.temperature > 0:
                request.use_draw()
        self._num_read = written
        return tokens


def _without_threshold(policy: ExitPolicy) -> ExitPolicy:
    """``policy`` with its default threshold: thresholds are per slot, the rest is common to all slots."""
    return replace(policy, threshold=policy.default)
