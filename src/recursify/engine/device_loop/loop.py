"""Iterations of new tokens that the host does not look at: what goes on is decided on the device, in fixed shapes.

The same iteration as the engine's, over *slots*, each of which has one request's token under way: **enter**, **block**
with the test who leaves, **exit**. Depth is data: one call of the block has rows at all depths. Every tensor has the
size that it may need at most, so each of the three can be captured in a CUDA graph and replayed, and the host looks at
a ring of tokens now and then (``residents.py``, ``graphs.py``).

What has no room waits. Prelude and coda take fewer rows than the block (a token goes through them once, and through the
block several times); with ``deferred`` keys the block takes more rows than there are slots, since tokens that left
early come along. Who goes first changes with every iteration, so that nobody waits for long.

Shape legend: S slots, N rows, D hidden size, R depths, W tokens of a slot that are under way, F forced depths, M pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recursify.engine.layers.batch import window_per_row
from recursify.engine.layers.model_runner import ModelRunner
from recursify.engine.layers.static_batch import StaticAttentionBatch
from recursify.engine.page_pool import pages_for
from recursify.engine.sampler import choose
from recursify.kernels.dispatch import Implementation
from recursify.kernels.exit_head import ExitStatistics, exit_statistics
from recursify.kernels.kv_write import store_keys_and_values
from recursify.kernels.slot_advance import OutputRing, Slots, advance_slots
from recursify.modeling.recursive_policies import Confidence, Entropy, ExitContext, ExitLimits, ExitPolicy, exits

MOST_PENDING = 64
"""Tokens of a slot that may wait for deeper recursions: as many as exit settings allow by default."""

MOST_FORCED = 64
"""Forced depths that a slot has room for."""

MOST_ENDS = 8
"""Tokens that end a text, which the device knows; of more, the host cuts texts off."""


@dataclass(frozen=True)
class LoopShape:
    """What is fixed in an iteration.

    Attributes:
        slots: How many there are; the first ones.
        enters: Rows of prelude.
        rows: Rows of the block.
        exits: Rows of coda and readout.
        leaves: Whether tokens may leave before the last recursion.
        samples: Whether any token is drawn: logits are then written, and sorted.
        reads: Whether any token is the first choice.
    """

    slots: int
    enters: int
    rows: int
    exits: int
    leaves: bool
    samples: bool = False
    reads: bool = True


@dataclass(frozen=True)
class SlotSettings:
    """What the host says of the slots; written by it between replays.

    Attributes:
        tables: Int32 ``[S, M]``: pages; -1 where there is none.
        limits: Int32 ``[S]``: the position that the last token will have.
        max_depth: Int64 ``[S]``: the last recursion that tokens run.
        max_pending: Int64 ``[S]``: how many tokens may wait for deeper recursions.
        forced: Int64 ``[S, F]``: depths of the tokens, in turn.
        num_forced: Int64 ``[S]``: how many of those count; 0 for none.
        thresholds: Float32 ``[S, R]``: above which confidence tokens leave; infinite where none does.
        temperature: Float64 ``[S]``; 0 for the first choice.
        top_k: Int64 ``[S]``; 0 for all.
        top_p: Float64 ``[S]``; 1 for all.
        draws: Float64 ``[S, most_said]``: what the next tokens are drawn by.
    """

    tables: Tensor
    limits: Tensor
    max_depth: Tensor
    max_pending: Tensor
    forced: Tensor
    num_forced: Tensor
    thresholds: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    draws: Tensor

    @classmethod
    def empty(
        cls, count: int, pages: int, depths: int, most_said: int, device: torch.device | str, *, pin: bool = False
    ) -> SlotSettings:
        """Of ``count`` slots without a request."""

        def full(value: float, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((count, *shape), value, dtype=dtype, device=device, pin_memory=pin)

        return cls(
            tables=full(-1, pages, dtype=torch.int32),
            limits=full(0, dtype=torch.int32),
            max_depth=full(depths - 1),
            max_pending=full(MOST_PENDING),
            forced=full(0, MOST_FORCED),
            num_forced=full(0),
            thresholds=full(math.inf, depths, dtype=torch.float32),
            temperature=full(0, dtype=torch.float64),
            top_k=full(0),
            top_p=full(1, dtype=torch.float64),
            draws=full(0, most_said, dtype=torch.float64),
        )


@dataclass(frozen=True)
class RowAssignment:
    """Which rows of a call are whose.

    Attributes:
        owner: ``[N]``: slots; the spare one where there is no row.
        positions: ``[N]``, of the rows; a slot's follow one another.
        there: Bool ``[N]``.
        taken: Bool ``[S]``: slots whose rows found room.
        own: ``[S]``: the last row of those.
    """

    owner: Tensor
    positions: Tensor
    there: Tensor
    taken: Tensor
    own: Tensor


class DeviceLoop:
    """The slots, and an iteration of them.

    Every tensor has a row more than there are slots: what is not there is written to that one.

    Args:
        runner: The model and its pages, in one stream.
        kv: Where keys and values of skipped depths come from.
        count: Slots.
        num_device_steps: Iterations, at most, between two looks of the host.
        implementation: Of the kernels.

    Attributes:
        slots: Token, depth, position and so on.
        settings: See :class:`SlotSettings`.
        fresh: Bool ``[S]``: the token has not been through the prelude.
        leaving: Bool ``[S]``: the token has left the block and not been through the coda.
        number: Int64 ``[S]``: new tokens of the request so far.
        said: Int64 ``[S]``: new tokens since the host looked.
        done: Int64 ``[S, R]``: positions before this one have run the depth.
        coda_from: Int64 ``[S]``: the first position that goes through the coda when the token leaves: its own, or that
            of the first one that came along to the last recursion.
        most_said: Tokens that a slot may say between two looks: one in every iteration, and one that has waited for an
            iteration of its own before them.
        held: ``[S, W, D]``: the state of the token at position ``p`` is at ``p % W``.
        embedded: ``[S, D]``: what the token was before the first layer.
        entered: ``[S, D]``: what entered the recursion that ran last.
        choice: Int64 ``[S]``: the next token, of those that have been read out.
        ends: Int64 ``[E]``: tokens that end every text.
        turn: Int64: calls of the block so far, which say who comes first.
        ring: What the host reads.
        tally: Int64 ``[3]``: calls of the block that a slot had a row in, rows in calls, and rows that had to wait.
    """

    def __init__(
        self, runner: ModelRunner, kv: str, count: int, num_device_steps: int, implementation: Implementation
    ) -> None:
        self.runner, self.decoder, self.kv, self.implementation = runner, runner.decoder, kv, implementation
        self.spare = count
        self.policy: ExitPolicy | None = None
        decoder, pages, device = runner.decoder, runner.kv_cache, runner.device
        self.last = decoder.num_depths - 1
        self.page_size = pages.page_size
        self.catches_up = kv == "deferred" and self.last > 0
        self.width = MOST_PENDING + 1 if self.catches_up else 1
        self.most_said = num_device_steps + 1
        self.slots = Slots.empty(count + 1, device)
        self.settings = SlotSettings.empty(
            count + 1, pages_for(pages.context, self.page_size), decoder.num_depths, self.most_said, device
        )
        states = {"dtype": decoder.dtype, "device": device}
        whole = {"dtype": torch.long, "device": device}
        size = decoder.config.hidden_size
        self.fresh = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self.leaving = torch.zeros_like(self.fresh)
        self.number = torch.zeros(count + 1, **whole)
        self.said = torch.zeros(count + 1, **whole)
        self.done = torch.zeros(count + 1, decoder.num_depths, **whole)
        self.coda_from = torch.zeros(count + 1, **whole)
        self.held = torch.zeros(count + 1, self.width, size, **states)
        self.embedded = torch.zeros(count + 1, size, **states)
        self.entered = torch.zeros(count + 1, size, **states)
        self.choice = torch.zeros(count + 1, **whole)
        self.ends = torch.full((MOST_ENDS,), -1, **whole)
        self.ring = OutputRing.empty(count * self.most_said, device)
        self.turn = torch.zeros((), **whole)
        self.tally = torch.zeros(3, **whole)
        # Constants: what is made of numbers cannot be made while a graph is captured.
        self._numbers = torch.arange(self.most_rows + 1, **whole)
        self._offsets = torch.tensor(pages.layout.offsets, **whole)
        self._no_offset = torch.zeros(1, **whole)
        self._deeper = torch.arange(1, decoder.num_depths, **whole)
        depths = torch.arange(decoder.num_depths, device=device)
        self._reaches = {
            layer.windows: window_per_row(layer.windows, depths if len(layer.windows) > 1 else depths[:1])
            for layer in decoder.layers
        }

    @property
    def most_rows(self) -> int:
        """That a part may have: for all slots and half as many again, or for all tokens of one that come along."""
        return max(self.spare + self.spare // 2, self.room_for(self.width))

    @staticmethod
    def room_for(tokens: int) -> int:
        """Rows for one slot that brings along so many tokens, its own included; in eights, so that shapes are few."""
        return 0 if tokens == 1 else 8 * math.ceil(tokens / 8)

    @property
    def reads_to_decide(self) -> bool:
        """Whether the policy looks at logits: all rows then go through the coda and are read out, whoever leaves."""
        return isinstance(self.policy, Confidence | Entropy)

    def _brings_along(self, shape: LoopShape) -> bool:
        """Whether tokens that left early come along with later ones of their slot."""
        return self.catches_up and shape.leaves

    # --- Who goes ------------------------------------------------------------------------------------------------

    def _lay_out(self, wanted: Tensor, first: Tensor | None, room: int) -> RowAssignment:
        """``room`` rows for slots that are ``wanted [S]``: from ``first [S]``, or from their token's, to their token's.

        All of a slot's rows or none, the first ones first; who that is changes with every call of the block.
        """
        count = len(wanted)
        position = self.slots.position[:count].long()
        if first is None and room == count:
            numbers = self._numbers[:count]
            owner, positions = torch.where(wanted, numbers, self.spare), torch.where(wanted, position, 0)
            return RowAssignment(owner, positions, wanted, wanted, numbers)
        first = position if first is None else first
        order = ((self._numbers[:count] + self.turn) % count).argsort()
        sizes = torch.where(wanted, position + 1 - first, 0)[order]
        sizes = torch.where(sizes.cumsum(0) <= room, sizes, 0)
        ends = sizes.cumsum(0)
        assert room <= self.most_rows
        row = self._numbers[:room]
        place = torch.searchsorted(ends, row, right=True)
        there = place < count
        place = place.clamp(max=count - 1)
        whose = order[place]
        positions = first[whose] + row - (ends - sizes)[place]
        taken = torch.zeros_like(wanted).index_put((order,), sizes > 0)
        own = torch.zeros_like(order).index_put((order,), (ends - 1).clamp(min=0))
        return RowAssignment(torch.where(there, whose, self.spare), torch.where(there, positions, 0), there, taken, own)

    def _states(self, slots: slice) -> Tensor:
        """Of slots' own tokens, ``[S, D]``."""
        return self.held[self._numbers[slots], self.slots.position[slots].long() % self.width]

    def _rows(self, layout: RowAssignment, depths: Tensor | None, *, only_writes: bool = False) -> StaticAttentionBatch:
        """Of a call of the block at ``depths [N]``, or of prelude or coda."""
        there, positions = layout.there, layout.positions
        tables = self.settings.tables[layout.owner]
        pages = (positions // self.page_size).clamp(max=tables.shape[1] - 1)
        block = tables.gather(1, pages[:, None])[:, 0].long()
        return StaticAttentionBatch(
            positions=positions,
            depths=torch.zeros_like(positions) if depths is None else torch.where(there, depths, 0),
            slots=torch.where(there & (block >= 0), block * self.page_size + positions % self.page_size, -1),
            lengths=torch.where(there, positions + 1, 0),
            tables=tables,
            offsets=self._no_offset if depths is None else self._offsets,
            reaches=self._reaches,
            implementation=self.implementation,
            only_writes=only_writes,
        )

    # --- An iteration --------------------------------------------------------------------------------------------

    def enter(self, shape: LoopShape) -> None:
        """Embedding and prelude, for tokens that begin. It does not wait for the device, and nor do the next two."""
        every = slice(0, shape.slots)
        fresh = self.slots.active[every] & self.fresh[every]
        layout = self._lay_out(fresh, None, shape.enters)
        embedded = self.decoder.embed(self.slots.token[layout.owner].long()[:, None])[:, 0]
        states = self.runner.run_static(self.decoder.prelude, self._rows(layout, None), embedded)
        self.held[layout.owner, layout.positions % self.width] = states
        self.embedded[layout.owner] = embedded
        self.fresh[every] &= ~layout.taken
        self.tally[2] += (fresh & ~layout.taken).sum()

    def block(self, shape: LoopShape) -> None:
        """One call of the block, for tokens that have entered and not left; who stays is a recursion deeper then."""
        pending = self._pending(slice(0, shape.slots))
        ran = self._run_block(shape)
        leaves = self._test(shape, ran, pending)
        self.leaving[: shape.slots] |= leaves
        if shape.leaves:
            self._fill_skipped(shape, leaves)
        self.slots.depth[: shape.slots] += ran & ~leaves
        self.turn += 1

    def exit(self, shape: LoopShape) -> None:
        """Coda and readout for tokens that have left, whose slots start on the next ones then."""
        exits = self._compute_logits(shape)
        every = slice(0, shape.slots)
        slots = Slots(**{name: held[every] for name, held in vars(self.slots).items()})
        advance_slots(
            slots,
            exits,
            self.choice[every],
            waits=~exits,
            limits=self.settings.limits[every],
            ends=self.ends,
            block_table=self.settings.tables[every],
            page_size=self.page_size,
            num_depths=self.decoder.num_depths,
            ring=self.ring,
            implementation=self.implementation,
        )
        self.leaving[every] &= ~exits
        self.fresh[every] |= exits
        self.number[every] += exits
        self.said[every] += exits

    # --- Parts of those ------------------------------------------------------------------------------------------

    def _run_block(self, shape: LoopShape) -> Tensor:
        """One call of the block; which slots had rows in it, ``[S]``."""
        every = slice(0, shape.slots)
        goes = self.slots.active[every] & ~self.fresh[every] & ~self.leaving[every]
        depth, done = self.slots.depth[every].long()[:, None], self.done[every]
        first = done.gather(1, depth)[:, 0]
        layout = self._lay_out(goes, first if self._brings_along(shape) else None, shape.rows)
        if shape.leaves:
            self.entered[every] = torch.where(layout.taken[:, None], self._states(every), self.entered[every])
        place = (layout.owner, layout.positions % self.width)
        rows = self._rows(layout, self.slots.depth[layout.owner].long())
        self.held[place] = self.runner.run_static(self.decoder.block, rows, self.held[place])
        if self.catches_up:
            # What its token leaves the block with goes through the coda, and so does what came along to the very end.
            at_end = (depth[:, 0] == self.last) & layout.taken
            position = self.slots.position[every].long()
            self.coda_from[every] = torch.where(
                at_end, first, torch.where(layout.taken, position, self.coda_from[every])
            )
            ran = torch.where(layout.taken, position + 1, first)
            done.scatter_(1, depth, ran[:, None])
        self.tally += torch.stack([layout.taken.sum(), layout.there.sum(), (goes & ~layout.taken).sum()])
        return layout.taken

    def _test(self, shape: LoopShape, ran: Tensor, pending: Tensor | int) -> Tensor:
        """Decide which tokens exit, bool ``[S]``, of those that ``ran [S]``; ``pending [S]`` tokens are deferred."""
        every = slice(0, shape.slots)
        depth = self.slots.depth[every].long()
        confidence: Tensor | float = -math.inf
        limits = ExitLimits(depth, self.last)
        reading = None
        if self.reads_to_decide:
            states, layout = self._run_coda(shape, ran, shape.rows)
            states = states[layout.own]
            reading = self._read(states)
            choice = self._choose(shape, states, self._numbers[every], reading)
            self.choice[every] = torch.where(ran, choice, self.choice[every])
        if shape.leaves:
            settings = self.settings
            num_forced = settings.num_forced[every]
            turn = self.number[every] % num_forced.clamp(min=1)
            forced = settings.forced[every].gather(1, turn[:, None])[:, 0]
            limits = ExitLimits(
                depth,
                settings.max_depth[every],
                settings.thresholds[every].gather(1, depth[:, None])[:, 0],
                pending=pending,
                max_pending=settings.max_pending[every],
                forced_depth=torch.where(num_forced > 0, forced, -1),
            )
            if self.policy is not None:
                confidence = self._confidence(every, reading)
        return exits(confidence, limits) & ran

    def _confidence(self, every: slice, reading: ExitStatistics | None) -> Tensor:
        """Confidence of the policy at each token's depth, float32 ``[S]``."""
        assert self.policy is not None
        depth = self.slots.depth[every].long()
        if isinstance(self.policy, Confidence):
            assert reading is not None
            return reading.probability_margin
        if isinstance(self.policy, Entropy):
            assert reading is not None
            return 1 - reading.entropy / math.log(self.decoder.config.vocab_size)
        states, heads = self._states(every), getattr(self.decoder.model, "exit_heads", None)
        confidence = torch.zeros_like(depth, dtype=torch.float32)
        for at in range(self.last):
            boundary = ExitContext(
                at,
                states,
                self.embedded[every] if at == 0 else self.entered[every],
                arrive=_no_logits,
                read=_no_logits,
                previous_logits=None,
                test=None if heads is None else _agreement(heads[at], states),
            )
            confidence = torch.where(depth == at, self.policy.confidence(boundary).float(), confidence)
        return confidence

    def _pending(self, every: slice) -> Tensor | int:
        """Number of tokens per slot whose deeper keys and values are deferred, ``[S]``, its current one included.

        It is counted before the block runs, which computes some of them.
        """
        if self.policy is None or not self.catches_up:
            return 0
        run = self.done[every].gather(1, self.settings.max_depth[every][:, None])[:, 0]
        return self.slots.position[every].long() + 1 - run

    def _fill_skipped(self, shape: LoopShape, leaves: Tensor) -> None:
        """Keys and values of the recursions that tokens skip, where those do not wait for later ones."""
        if self.kv == "deferred":
            return
        every, deeper = slice(0, shape.slots), len(self._deeper)
        depth = self.slots.depth[every].long().repeat(deeper)
        target = self._deeper.repeat_interleave(shape.slots, output_size=shape.slots * deeper)
        there = leaves.repeat(deeper) & (target > depth)
        owner = self._numbers[every].repeat(deeper)
        positions = torch.where(there, self.slots.position[owner].long(), 0)
        rows = self._rows(RowAssignment(owner, positions, there, leaves, owner), target, only_writes=True)
        if self.kv == "copied":
            self.runner.run_static(self.decoder.block, rows, self._states(every).repeat(deeper, 1))
            return
        source = torch.where(there, rows.slots + self._offsets[depth] * self.page_size, 0).clamp(min=0)
        for layer in self.decoder.block:
            keys, values = (held.flatten(0, 1)[source] for held in (layer.keys, layer.values))
            store_keys_and_values(
                keys,
                values,
                layer.keys,
                layer.values,
                rows.slots,
                rows.depths,
                self._offsets,
                implementation=self.implementation,
            )

    def _compute_logits(self, shape: LoopShape) -> Tensor:
        """Coda and readout for tokens that have left; which slots' next tokens are there, ``[S]``."""
        leaving = self.leaving[: shape.slots].clone()  # it changes before what is returned is done with
        if self.reads_to_decide:
            return leaving
        states, layout = self._run_coda(shape, leaving, shape.exits)
        self.tally[2] += (leaving & ~layout.taken).sum()
        owner = layout.owner
        if self._brings_along(shape):  # those that came along are not read
            states, owner = states[layout.own], torch.where(layout.taken, self._numbers[: shape.slots], self.spare)
        self.choice[owner] = self._choose(shape, states, owner, self._read(states) if shape.reads else None)
        return layout.taken

    def _choose(self, shape: LoopShape, states: Tensor, owner: Tensor, reading: ExitStatistics | None) -> Tensor:
        """The next tokens of slots ``owner [n]``, as their requests want them: ``[n]``.

        A first choice is the reading's, whoever is beside it: in bfloat16 logits that are written are rounded, and
        some of those that differ are the same then.
        """
        held = self.settings
        if not shape.samples:
            assert reading is not None
            return reading.choice
        logits = self.runner.compute_logits(states)
        draws = held.draws[owner].gather(1, self.said[owner][:, None])[:, 0]
        drawn = choose(logits, held.temperature[owner], held.top_k[owner], held.top_p[owner], draws)
        return drawn if reading is None else torch.where(held.temperature[owner] > 0, drawn, reading.choice)

    def _run_coda(self, shape: LoopShape, wanted: Tensor, room: int) -> tuple[Tensor, RowAssignment]:
        """What the coda makes of the tokens of slots that are ``wanted [S]``, and of those that came along."""
        every = slice(0, shape.slots)
        layout = self._lay_out(wanted, self.coda_from[every] if self._brings_along(shape) else None, room)
        states = self.held[layout.owner, layout.positions % self.width]
        return self.runner.run_static(self.decoder.coda, self._rows(layout, None), states), layout

    def _read(self, states: Tensor) -> ExitStatistics:
        decoder = self.decoder
        assert decoder.head is not None
        return exit_statistics(
            decoder.norm(states),
            decoder.head.weight,
            decoder.head.bias,
            softcap=decoder.softcap,
            implementation=self.implementation,
        )


def _agreement(head: torch.nn.Module, states: Tensor) -> Callable[[], Tensor]:
    """The trained test of an exit head."""
    agreement: Callable[[Tensor], Tensor] = head.agreement  # type: ignore[assignment]
    return lambda: agreement(states)


def _no_logits(*_: object) -> Tensor:
    raise AssertionError("policies that look at logits are decided by readings")
