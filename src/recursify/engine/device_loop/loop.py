"""Device-side decode loop: scheduling decisions are tensor operations with static shapes, for CUDA graphs to capture.

An iteration is the engine's own: **enter** (embedding, prelude), **block** (one recursion, then the exit decision) and
**exit** (coda, logits, next token). It runs over *slots*, each with one token in progress. Depth is data: the rows of a
block call are at any depths. The host replays a few iterations and then reads a ring of tokens
(:mod:`.slot_manager`, :mod:`.cuda_graphs`).

Rows that do not fit wait for a later iteration. Prelude and coda have fewer rows than the block, since a token runs
them once and the block several times. With ``deferred`` keys and values the block has more rows than there are slots,
since deferred tokens run together with later ones. Slots take turns in going first, so none waits for long.

No shape and no branch depends on the contents of a tensor, and nothing synchronizes with the device.

Shape legend: S slots, N rows, D hidden size, R depths, W states per slot, E EOS ids.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from recursify.engine.layers.batch import window_per_row
from recursify.engine.layers.model_runner import ModelRunner
from recursify.engine.layers.static_batch import StaticAttentionBatch
from recursify.engine.page_pool import pages_for
from recursify.engine.sampler import choose
from recursify.kernels.dispatch import Implementation
from recursify.kernels.exit_head import ExitStatistics, exit_statistics
from recursify.kernels.slot_advance import OutputRing, Slots, advance_slots
from recursify.modeling.recursive_policies import Confidence, Entropy, ExitContext, ExitLimits, ExitPolicy, decide_exits

from .slots import MAX_EOS_TOKENS, MAX_PENDING, LoopShape, RowAssignment, SlotSettings, SlotState


class DeviceLoop:
    """Slots on the device and the three parts of an iteration.

    Tensors have one row more than there are slots: the spare slot, which unused rows write to.

    Attributes:
        policy: Exit policy of all slots; thresholds are in ``settings``.
        slots: Token, depth, position and address of each slot.
        state: Progress of the tokens.
        settings: Settings written by the host.
        eos_tokens: Int64 ``[E]``: tokens that end every sequence; -1 for an unused entry.
        ring: Tokens for the host to read.
        counters: Int64 ``[3]``, see :class:`~.slots.LoopCounters`.
        num_block_calls: Int64: number of block calls, which determines the slot that goes first.
        tokens_per_sync: Maximum number of tokens per slot between two reads: one per iteration, and one that had exited
            before.
    """

    def __init__(
        self, runner: ModelRunner, kv: str, num_slots: int, num_device_steps: int, implementation: Implementation
    ) -> None:
        self.runner, self.decoder, self.kv, self.implementation = runner, runner.decoder, kv, implementation
        self.policy: ExitPolicy | None = None
        decoder, kv_cache, device = runner.decoder, runner.kv_cache, runner.device
        self.spare_slot = num_slots
        self.last_depth = decoder.num_depths - 1
        self.page_size = kv_cache.page_size
        self.defers = kv == "deferred" and self.last_depth > 0
        self.width = MAX_PENDING + 1 if self.defers else 1
        self.tokens_per_sync = num_device_steps + 1
        max_pages = pages_for(kv_cache.context, self.page_size)
        self.slots = Slots.empty(num_slots + 1, device)
        self.state = SlotState(num_slots + 1, self.width, decoder)
        self.settings = SlotSettings(num_slots + 1, max_pages, decoder.num_depths, self.tokens_per_sync, device)
        integers = {"dtype": torch.long, "device": device}
        self.eos_tokens = torch.full((MAX_EOS_TOKENS,), -1, **integers)
        self.ring = OutputRing.empty(num_slots * self.tokens_per_sync, device)
        self.counters = torch.zeros(3, **integers)
        self.num_block_calls = torch.zeros((), **integers)
        # Constants are made here: capturing a graph forbids host-to-device copies.
        self._range = torch.arange(self.max_rows + 1, **integers)
        self._page_offsets = torch.tensor(kv_cache.layout.offsets, **integers)
        self._no_offset = torch.zeros(1, **integers)
        self._deeper = torch.arange(1, decoder.num_depths, **integers)
        depths = torch.arange(decoder.num_depths, device=device)
        self._windows = {
            layer.windows: window_per_row(layer.windows, depths if len(layer.windows) > 1 else depths[:1])
            for layer in decoder.layers
        }

    @property
    def max_rows(self) -> int:
        """Maximum number of rows of a call: one and a half per slot, or all deferred tokens of one slot."""
        return max(self.spare_slot + self.spare_slot // 2, self.rows_for(self.width))

    @staticmethod
    def rows_for(num_tokens: int) -> int:
        """Rows for one slot that runs ``num_tokens`` together, in multiples of 8 to limit the number of shapes."""
        return 0 if num_tokens == 1 else 8 * math.ceil(num_tokens / 8)

    @property
    def policy_reads_logits(self) -> bool:
        """True if the policy needs logits: all rows then run coda and head, whether they exit or not."""
        return isinstance(self.policy, Confidence | Entropy)

    def _runs_deferred(self, shape: LoopShape) -> bool:
        """True if deferred tokens run together with later ones of their slot."""
        return self.defers and shape.exits_early

    # --- Rows ----------------------------------------------------------------------------------------------------

    def _assign_rows(self, wanted: Tensor, first: Tensor | None, num_rows: int) -> RowAssignment:
        """Assign ``num_rows`` rows to the ``wanted`` slots, bool ``[S]``.

        A slot gets one row per position from ``first [S]`` (None: that of its token) to that of its token, or none. The
        slot that goes first changes with every block call.
        """
        count = len(wanted)
        position = self.slots.position[:count].long()
        if first is None and num_rows == count:
            slots = self._range[:count]
            rows_of = torch.where(wanted, slots, self.spare_slot)
            return RowAssignment(rows_of, torch.where(wanted, position, 0), wanted, wanted, slots)
        first = position if first is None else first
        order = ((self._range[:count] + self.num_block_calls) % count).argsort()
        sizes = torch.where(wanted, position + 1 - first, 0)[order]
        sizes = torch.where(sizes.cumsum(0) <= num_rows, sizes, 0)
        ends = sizes.cumsum(0)
        assert num_rows <= self.max_rows
        rows = self._range[:num_rows]
        rank = torch.searchsorted(ends, rows, right=True)
        is_used = rank < count
        rank = rank.clamp(max=count - 1)
        slots = order[rank]
        positions = first[slots] + rows - (ends - sizes)[rank]
        return RowAssignment(
            slots=torch.where(is_used, slots, self.spare_slot),
            positions=torch.where(is_used, positions, 0),
            is_used=is_used,
            is_selected=torch.zeros_like(wanted).index_put((order,), sizes > 0),
            last_rows=torch.zeros_like(order).index_put((order,), (ends - 1).clamp(min=0)),
        )

    def _batch(self, rows: RowAssignment, depths: Tensor | None, *, only_writes: bool = False) -> StaticAttentionBatch:
        """Attention batch of a block call at ``depths [N]``, or of prelude or coda."""
        is_used, positions = rows.is_used, rows.positions
        tables = self.settings.block_tables[rows.slots]
        index = (positions // self.page_size).clamp(max=tables.shape[1] - 1)
        page = tables.gather(1, index[:, None])[:, 0].long()
        return StaticAttentionBatch(
            positions=positions,
            depths=torch.zeros_like(positions) if depths is None else torch.where(is_used, depths, 0),
            slots=torch.where(is_used & (page >= 0), page * self.page_size + positions % self.page_size, -1),
            lengths=torch.where(is_used, positions + 1, 0),
            block_tables=tables,
            page_offsets=self._no_offset if depths is None else self._page_offsets,
            windows=self._windows,
            implementation=self.implementation,
            only_writes=only_writes,
        )

    def _current_states(self, span: slice) -> Tensor:
        """Hidden states of the slots' tokens, ``[S, D]``."""
        return self.state.states[self._range[span], self.slots.position[span].long() % self.width]

    # --- Parts of an iteration -----------------------------------------------------------------------------------

    def enter(self, shape: LoopShape) -> None:
        """Embed tokens that begin, and run the prelude."""
        span, state = shape.span, self.state
        entering = self.slots.active[span] & state.is_entering[span]
        rows = self._assign_rows(entering, None, shape.enter_rows)
        embedded = self.decoder.embed(self.slots.token[rows.slots].long()[:, None])[:, 0]
        states = self.runner.run_static(self.decoder.prelude, self._batch(rows, None), embedded)
        state.states[rows.slots, rows.positions % self.width] = states
        state.embedded[rows.slots] = embedded
        state.is_entering[span] &= ~rows.is_selected
        self.counters[2] += (entering & ~rows.is_selected).sum()

    def block(self, shape: LoopShape) -> None:
        """Run one recursion for tokens inside the block; those that do not exit move one depth deeper."""
        pending = self._num_pending(shape.span)
        ran = self._run_block(shape)
        exiting = self._decide_exits(shape, ran, pending)
        self.state.is_exiting[shape.span] |= exiting
        if shape.exits_early:
            self._write_skipped(shape, exiting)
        self.slots.depth[shape.span] += ran & ~exiting
        self.num_block_calls += 1

    def exit(self, shape: LoopShape) -> None:
        """Run coda and head for tokens that have exited; their slots continue with the next token."""
        span, state = shape.span, self.state
        finished = self._finish_tokens(shape)
        advance_slots(
            Slots(**{name: tensor[span] for name, tensor in vars(self.slots).items()}),
            finished,
            state.next_token[span],
            waits=~finished,
            limits=self.settings.limits[span],
            ends=self.eos_tokens,
            block_table=self.settings.block_tables[span],
            page_size=self.page_size,
            num_depths=self.decoder.num_depths,
            ring=self.ring,
            implementation=self.implementation,
        )
        state.is_exiting[span] &= ~finished
        state.is_entering[span] |= finished
        state.num_generated[span] += finished
        state.num_unread[span] += finished

    # --- Block ---------------------------------------------------------------------------------------------------

    def _run_block(self, shape: LoopShape) -> Tensor:
        """Run one block call; returns the slots that had rows in it, bool ``[S]``."""
        span, state = shape.span, self.state
        wanted = self.slots.active[span] & ~state.is_entering[span] & ~state.is_exiting[span]
        depth, first_pending = self.slots.depth[span].long()[:, None], state.first_pending[span]
        first = first_pending.gather(1, depth)[:, 0]
        rows = self._assign_rows(wanted, first if self._runs_deferred(shape) else None, shape.block_rows)
        selected = rows.is_selected
        if shape.exits_early:
            state.entered[span] = torch.where(selected[:, None], self._current_states(span), state.entered[span])
        at = (rows.slots, rows.positions % self.width)
        batch = self._batch(rows, self.slots.depth[rows.slots].long())
        state.states[at] = self.runner.run_static(self.decoder.block, batch, state.states[at])
        if self.defers:
            # The coda runs the token, and with it the deferred tokens that ran the last recursion.
            ran_all = (depth[:, 0] == self.last_depth) & selected
            position = self.slots.position[span].long()
            coda_start = torch.where(selected, position, state.coda_start[span])
            state.coda_start[span] = torch.where(ran_all, first, coda_start)
            first_pending.scatter_(1, depth, torch.where(selected, position + 1, first)[:, None])
        self.counters += torch.stack([selected.sum(), rows.is_used.sum(), (wanted & ~selected).sum()])
        return selected

    def _num_pending(self, span: slice) -> Tensor | int:
        """Number of tokens per slot whose deeper keys and values are deferred, ``[S]``, its current one included.

        It is counted before the block runs, which computes some of them.
        """
        if self.policy is None or not self.defers:
            return 0
        first = self.state.first_pending[span].gather(1, self.settings.max_depth[span][:, None])[:, 0]
        return self.slots.position[span].long() + 1 - first

    def _decide_exits(self, shape: LoopShape, ran: Tensor, pending: Tensor | int) -> Tensor:
        """Decide which tokens exit, bool ``[S]``, of those that ``ran [S]``; ``pending [S]`` tokens are deferred."""
        span, settings = shape.span, self.settings
        depth = self.slots.depth[span].long()
        confidence: Tensor | float = -math.inf
        limits = ExitLimits(depth, self.last_depth)
        statistics = None
        if self.policy_reads_logits:
            states, rows = self._run_coda(shape, ran, shape.block_rows)
            states = states[rows.last_rows]
            statistics = self._exit_statistics(states)
            tokens = self._sample(shape, states, self._range[span], statistics)
            self.state.next_token[span] = torch.where(ran, tokens, self.state.next_token[span])
        if shape.exits_early:
            num_forced = settings.num_forced[span]
            turn = self.state.num_generated[span] % num_forced.clamp(min=1)
            forced_depth = settings.forced_depths[span].gather(1, turn[:, None])[:, 0]
            limits = ExitLimits(
                depth,
                settings.max_depth[span],
                settings.thresholds[span].gather(1, depth[:, None])[:, 0],
                pending=pending,
                max_pending=settings.max_pending[span],
                forced_depth=torch.where(num_forced > 0, forced_depth, -1),
            )
            if self.policy is not None:
                confidence = self._confidence(self.policy, span, statistics)
        return decide_exits(confidence, limits) & ran

    def _confidence(self, policy: ExitPolicy, span: slice, statistics: ExitStatistics | None) -> Tensor:
        """Confidence of the policy at each token's depth, float32 ``[S]``."""
        if statistics is not None:
            if isinstance(policy, Confidence):
                return statistics.probability_margin
            return 1 - statistics.entropy / math.log(self.decoder.config.vocab_size)
        depth, states = self.slots.depth[span].long(), self._current_states(span)
        heads = getattr(self.decoder.model, "exit_heads", None)
        confidence = torch.zeros_like(depth, dtype=torch.float32)
        for exit_depth in range(self.last_depth):
            context = ExitContext(
                exit_depth,
                states,
                self.state.embedded[span] if exit_depth == 0 else self.state.entered[span],
                arrive=_no_logits,
                read=_no_logits,
                previous_logits=None,
                test=None if heads is None else partial(heads[exit_depth].agreement, states),
            )
            confidence = torch.where(depth == exit_depth, policy.confidence(context).float(), confidence)
        return confidence

    def _write_skipped(self, shape: LoopShape, exiting: Tensor) -> None:
        """Write keys and values of the depths that ``exiting`` tokens skip, unless they are deferred."""
        if self.kv == "deferred":
            return
        span, num_deeper = shape.span, len(self._deeper)
        depth = self.slots.depth[span].long().repeat(num_deeper)
        target = self._deeper.repeat_interleave(shape.num_slots, output_size=shape.num_slots * num_deeper)
        is_used = exiting.repeat(num_deeper) & (target > depth)
        slots = self._range[span].repeat(num_deeper)
        positions = torch.where(is_used, self.slots.position[slots].long(), 0)
        batch = self._batch(RowAssignment(slots, positions, is_used, exiting, slots), target, only_writes=True)
        if self.kv == "copied":
            self.runner.run_static(self.decoder.block, batch, self._current_states(span).repeat(num_deeper, 1))
            return
        source = torch.where(is_used, batch.slots + self._page_offsets[depth] * self.page_size, 0).clamp(min=0)
        for layer in self.decoder.block:
            keys, values = (pages.flatten(0, 1)[source] for pages in (layer.keys, layer.values))
            batch.store(layer, keys, values)

    # --- Coda and logits -----------------------------------------------------------------------------------------

    def _finish_tokens(self, shape: LoopShape) -> Tensor:
        """Compute the next tokens of slots whose token has exited; returns the slots that have one, bool ``[S]``."""
        exiting = self.state.is_exiting[shape.span].clone()  # the caller changes is_exiting and still needs this
        if self.policy_reads_logits:
            return exiting
        states, rows = self._run_coda(shape, exiting, shape.exit_rows)
        self.counters[2] += (exiting & ~rows.is_selected).sum()
        slots = rows.slots
        if self._runs_deferred(shape):  # only the token itself needs logits
            states = states[rows.last_rows]
            slots = torch.where(rows.is_selected, self._range[shape.span], self.spare_slot)
        statistics = self._exit_statistics(states) if shape.is_greedy else None
        self.state.next_token[slots] = self._sample(shape, states, slots, statistics)
        return rows.is_selected

    def _run_coda(self, shape: LoopShape, wanted: Tensor, num_rows: int) -> tuple[Tensor, RowAssignment]:
        """Run the coda on the tokens of ``wanted [S]`` slots and on deferred ones that ran all recursions with them."""
        first = self.state.coda_start[shape.span] if self._runs_deferred(shape) else None
        rows = self._assign_rows(wanted, first, num_rows)
        states = self.state.states[rows.slots, rows.positions % self.width]
        return self.runner.run_static(self.decoder.coda, self._batch(rows, None), states), rows

    def _sample(self, shape: LoopShape, states: Tensor, slots: Tensor, statistics: ExitStatistics | None) -> Tensor:
        """Next tokens of ``slots [N]`` by the settings of their requests, ``[N]``.

        Greedy requests take the argmax of ``statistics`` whatever the batch: logits written in bfloat16 are rounded,
        which makes different ones equal.
        """
        settings = self.settings
        if not shape.samples:
            assert statistics is not None
            return statistics.choice
        temperature = settings.temperature[slots]
        draws = settings.draws[slots].gather(1, self.state.num_unread[slots][:, None])[:, 0]
        logits = self.runner.compute_logits(states)
        limits = settings.top_k[slots], settings.top_p[slots], settings.min_p[slots]
        tokens = choose(logits, temperature, *limits, draws)
        return tokens if statistics is None else torch.where(temperature > 0, tokens, statistics.choice)

    def _exit_statistics(self, states: Tensor) -> ExitStatistics:
        """Statistics of the logits of ``states [N, D]``."""
        decoder = self.decoder
        assert decoder.head is not None
        head, implementation = decoder.head, self.implementation
        states = decoder.norm(states)
        return exit_statistics(states, head.weight, head.bias, softcap=decoder.softcap, implementation=implementation)


def _no_logits(*_: object) -> Tensor:
    raise AssertionError("policies that read logits are decided from exit statistics")
