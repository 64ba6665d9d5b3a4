"""The rows of one call of some layers: where each token stands, what it sees, and where its keys and values go.

Everything here is made once per call and used by every layer in it.

Shape legend: N rows, n rows in a group, L keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recursify.modeling.recursive_decoding import on_device

from .kv_pages import KVPages

FEW = 4
"""Runs of so many tokens or fewer are rows of their own, each of which gathers its keys; longer ones share theirs."""


@dataclass
class Run:
    """Tokens of one request that go through the same layers at the same depth.

    Attributes:
        request: Whose they are.
        depth: Of the block; None in prelude and coda.
        positions: Of the tokens, ascending.
    """

    request: Any
    depth: int | None
    positions: Sequence[int]


class Rows:
    """Makes rows of ``runs``, which are sorted by depth.

    Args:
        runs: What goes through the layers.
        pages: Where keys and values are.
        only_writes: End every layer when its keys and values are written.

    Attributes:
        positions: ``[N]``.
        slots: Where to write, ``[N]``, or as many as ``writers`` names.
        writers: The rows that write; None for all. With ``shared`` keys only those at depth 0 do.
        singles: The rows that have a table of their own; None when those are all.
        tables: Their pages, ``[n, pages]``.
        chunks: The other rows.
    """

    def __init__(self, runs: Sequence[Run], pages: KVPages, *, only_writes: bool = False) -> None:
        self.only_writes = only_writes
        self._pages, self._device = pages, pages.parts.device
        self._masks: dict[Any, Tensor] = {}
        positions: list[int] = []
        slots: list[int] = []
        writers: list[int] = []
        singles: list[int] = []
        tables: list[list[int]] = []
        lengths: list[int] = []
        depths: list[int] = []
        self.chunks: list[Chunk] = []
        for run in runs:
            start, offset = len(positions), 0 if run.depth is None else pages.layout.offsets[run.depth]
            table = [page + offset for page in pages.table(run.request, run.depth)]
            places, seen = _places(run, pages)
            positions.extend(run.positions)
            depths.extend([run.depth or 0] * len(run.positions))
            if places is not None:
                size = pages.page_size
                slots.extend(table[place // size] * size + place % size for place in places)
                writers.extend(range(start, len(positions)))
            if len(run.positions) <= FEW:
                singles.extend(range(start, len(positions)))
                tables.extend([table] * len(run.positions))
                lengths.extend(seen)
            else:
                rows = slice(start, len(positions))
                self.chunks.append(Chunk(self, rows, run.depth or 0, run.positions, table, seen))
        self.positions, self._depths = on_device([positions, depths], self._device)
        self.slots = on_device(slots, self._device, torch.long)
        self.writers = None if len(writers) == len(positions) else on_device(writers, self._device, torch.long)
        self._is_packed = pages.is_packed and runs[0].depth is not None
        width = max((-(-length // pages.page_size) for length in lengths), default=0)
        self.tables = on_device([(table + [0] * width)[:width] for table in tables], self._device, torch.long)
        self._lengths = on_device(lengths, self._device, torch.long)
        self.singles = on_device(singles, self._device, torch.long) if self.chunks else None
        if self.chunks and not singles:
            self.singles = None
        if self._is_packed and places_written(self):
            written = self.positions if self.writers is None else self.positions[self.writers]
            pages.positions.view(-1)[self.slots] = written

    @property
    def depths(self) -> Tensor:
        """Of the rows, ``[N]``; 0 in prelude and coda."""
        return self._depths

    def visible(self, layer: Any) -> Tensor:
        """Which keys the single rows see in ``layer``, bool ``[n, L]``."""
        windows = layer.windows
        if windows not in self._masks:
            index = torch.arange(self.tables.shape[1] * self._pages.page_size, device=self._device)
            mask = index < self._lengths[:, None]
            if any(window is not None for window in windows):
                rows = slice(None) if self.singles is None else self.singles
                mask &= self.within(windows, self._depths[rows], self.positions[rows], self.tables)
            self._masks[windows] = mask
        return self._masks[windows]

    def within(self, windows: Sequence[int | None], depths: Tensor, positions: Tensor, tables: Tensor) -> Tensor:
        """Which keys are in the window of a row's depth, bool ``[n, L]``; tables ``[n, pages]``, or ``[pages]``."""
        far = torch.iinfo(torch.long).max
        by_depth = on_device([far if window is None else window for window in windows], self._device)
        if self._is_packed:
            columns = self._pages.positions[tables].flatten(-2)
        else:
            columns = torch.arange(tables.shape[-1] * self._pages.page_size, device=self._device)
        reach = by_depth[depths] if len(by_depth) > 1 else by_depth.expand(len(depths))
        return positions[:, None] - columns < reach[:, None]


def places_written(rows: Rows) -> bool:
    """Whether any row writes."""
    return len(rows.slots) > 0


class Chunk:
    """A longer run: its rows look at the same pages.

    Attributes:
        rows: Which of the call.
        table: Its pages ``[pages]``.
    """

    def __init__(
        self, call: Rows, rows: slice, depth: int, positions: Sequence[int], table: list[int], seen: list[int]
    ) -> None:
        self.rows = rows
        self._call, self._depth, self._positions, self._seen = call, depth, positions, seen
        count = -(-seen[-1] // call._pages.page_size)
        self.table = on_device(table[:count], call._device, torch.long)
        self._masks: dict[int | None, Tensor] = {}

    def visible(self, layer: Any) -> Tensor:
        """Which keys each row sees in ``layer``, bool ``[n, L]``."""
        window = layer.windows[self._depth if len(layer.windows) > 1 else 0]
        if window not in self._masks:
            device = self._call._device
            index = torch.arange(len(self.table) * self._call._pages.page_size, device=device)
            mask = index < on_device(self._seen, device)[:, None]
            if window is not None:
                positions = on_device(list(self._positions), device)
                mask &= self._call.within([window], positions, positions, self.table)
            self._masks[window] = mask
        return self._masks[window]


def _places(run: Run, pages: KVPages) -> tuple[Sequence[int] | None, list[int]]:
    """Where a run's keys go in its stream, None if it makes none; and how many keys each of its tokens sees."""
    depth = run.depth
    if depth is None or not pages.is_packed:
        return run.positions, [position + 1 for position in run.positions]
    home = 0 if pages.kv == "shared" else depth
    there = run.request.packed[home]
    seen = [bisect_right(there, position) for position in run.positions]
    return ([index - 1 for index in seen] if home == depth else None), seen
