"""Static tensors of the device loop, one row per slot, and the shapes of an iteration.

Shape legend: S slots, N rows, D hidden size, R depths, W states, F forced depths, M pages and T tokens per slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recursify.engine.layers.decoder import DecoderAdapter

MAX_PENDING = 64
"""Maximum number of deferred tokens per slot: the default of exit settings."""

MAX_FORCED_DEPTHS = 64
"""Maximum number of forced depths per slot."""

MAX_EOS_TOKENS = 8
"""Maximum number of EOS ids checked on the device; the host handles further ones."""


@dataclass(frozen=True)
class LoopShape:
    """Static shape of an iteration, which identifies its CUDA graphs.

    Attributes:
        num_slots: Number of slots, counted from the first.
        enter_rows: Rows of the prelude.
        block_rows: Rows of the block.
        exit_rows: Rows of the coda and the logits.
        exits_early: True if tokens may exit before the last recursion.
        samples: True if any request samples, which needs logits in memory.
        is_greedy: True if any request is greedy.
    """

    num_slots: int
    enter_rows: int
    block_rows: int
    exit_rows: int
    exits_early: bool
    samples: bool = False
    is_greedy: bool = True

    @property
    def span(self) -> slice:
        """Slice of the slots that take part."""
        return slice(0, self.num_slots)


class LoopCounters(NamedTuple):
    """Counts of the device loop since it was made.

    Attributes:
        slot_calls: Block calls in which a slot had a row, summed over slots.
        block_rows: Rows of block calls.
        waits: Rows that had to wait for a later iteration.
    """

    slot_calls: int = 0
    block_rows: int = 0
    waits: int = 0


class SlotSettings:
    """Settings of the slots, without a request at first. The host writes them between replays.

    Attributes:
        block_tables: Int32 ``[S, M]``: page ids; -1 for no page.
        limits: Int32 ``[S]``: position of the last token.
        max_depth: Int64 ``[S]``: last recursion that tokens run.
        max_pending: Int64 ``[S]``: maximum number of deferred tokens.
        forced_depths: Int64 ``[S, F]``: depths at which tokens exit, in cyclic order.
        num_forced: Int64 ``[S]``: number of valid entries of ``forced_depths``.
        thresholds: Float32 ``[S, R]``: confidence above which tokens exit; infinite for never.
        temperature: Float64 ``[S]``; 0 is greedy.
        top_k: Int64 ``[S]``; 0 keeps all.
        top_p: Float64 ``[S]``; 1 keeps all.
        min_p: Float64 ``[S]``; 0 keeps all.
        draws: Float64 ``[S, T]``: uniform random numbers for the next tokens.
    """

    def __init__(
        self, count: int, pages: int, depths: int, tokens: int, device: torch.device | str, *, pin: bool = False
    ) -> None:
        def full(value: float, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((count, *shape), value, dtype=dtype, device=device, pin_memory=pin)

        self.block_tables = full(-1, pages, dtype=torch.int32)
        self.limits = full(0, dtype=torch.int32)
        self.max_depth = full(depths - 1)
        self.max_pending = full(MAX_PENDING)
        self.forced_depths = full(0, MAX_FORCED_DEPTHS)
        self.num_forced = full(0)
        self.thresholds = full(math.inf, depths, dtype=torch.float32)
        self.temperature = full(0, dtype=torch.float64)
        self.top_k = full(0)
        self.top_p = full(1, dtype=torch.float64)
        self.min_p = full(0, dtype=torch.float64)
        self.draws = full(0, tokens, dtype=torch.float64)


class SlotState:
    """Progress of the token in each slot, beside :class:`~recursify.kernels.slot_advance.Slots`.

    Attributes:
        is_entering: Bool ``[S]``: the token has not run the prelude.
        is_exiting: Bool ``[S]``: the token has left the block and not run the coda.
        num_generated: Int64 ``[S]``: generated tokens of the request.
        num_unread: Int64 ``[S]``: tokens generated since the host last read.
        first_pending: Int64 ``[S, R]``: first position that has not run the depth.
        coda_start: Int64 ``[S]``: first position that runs the coda when the token exits: its own, or that of the first
            deferred token that ran the last recursion with it.
        states: ``[S, W, D]``: hidden state of position ``p`` at ``p % W``.
        embedded: ``[S, D]``: embedding of the token.
        entered: ``[S, D]``: hidden state that entered the last recursion.
        next_token: Int64 ``[S]``: argmax or sample of the last logits.
    """

    def __init__(self, count: int, width: int, decoder: DecoderAdapter) -> None:
        size = decoder.config.hidden_size

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(count, *shape, dtype=dtype, device=decoder.device)

        self.is_entering, self.is_exiting = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self.num_generated, self.num_unread = zeros(), zeros()
        self.first_pending, self.coda_start = zeros(decoder.num_depths), zeros()
        self.states = zeros(width, size, dtype=decoder.dtype)
        self.embedded, self.entered = zeros(size, dtype=decoder.dtype), zeros(size, dtype=decoder.dtype)
        self.next_token = zeros()


@dataclass(frozen=True)
class RowAssignment:
    """Assignment of the rows of a call to slots.

    Attributes:
        slots: ``[N]``: slot of each row; the spare slot for an unused row.
        positions: ``[N]``: position of each row; those of one slot are consecutive.
        is_used: Bool ``[N]``.
        is_selected: Bool ``[S]``: slots that got rows.
        last_rows: ``[S]``: last row of each selected slot.
    """

    slots: Tensor
    positions: Tensor
    is_used: Tensor
    is_selected: Tensor
    last_rows: Tensor
