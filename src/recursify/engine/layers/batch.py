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

from recursify.engine.request import Request
from recursify.kernels.kv_write import store_keys_and_values
from recursify.kernels.paged_attention import attend_pages
from recursify.modeling.recursive_columns import on_device

from .decoder import PagedLayer
from .kv_cache import KVCache
from .paged_attention import attend_chunk, attend_singles

FEW = 4
"""Runs of so many tokens or fewer are rows of their own, each of which gathers its keys; longer ones share theirs."""


@dataclass
class TokenSpan:
    """Tokens of one request that go through the same layers at the same depth.

    Attributes:
        request: Whose they are.
        depth: Of the block; None in prelude and coda.
        positions: Of the tokens, ascending.
    """

    request: Request
    depth: int | None
    positions: Sequence[int]


class AttentionBatch:
    """Makes rows of ``runs``, which are sorted by depth.

    Args:
        runs: What goes through the layers.
        pages: Where keys and values are.
        kernels: Have Triton write keys, and attend to them where a row has pages of its own.
        only_writes: End every layer when its keys and values are written.

    Attributes:
        positions: ``[N]``.
        depths: ``[N]``; 0 in prelude and coda.
        writers: The rows that write keys and values; None for all. With ``shared`` keys only those at depth 0 do.
        slots: Where they write, ``[N]`` or as many as ``writers`` names.
        singles: The rows that have a table of their own, if there are any.
        chunks: The other rows.
    """

    def __init__(
        self, runs: Sequence[TokenSpan], pages: KVCache, *, kernels: bool = False, only_writes: bool = False
    ) -> None:
        self.kernels, self.only_writes = kernels, only_writes
        device = pages.decoder.device
        positions: list[int] = []
        depths: list[int] = []
        writers: list[int] = []
        slots: list[int] = []
        singles: list[int] = []
        tables: list[list[int]] = []
        seen_by_singles: list[int] = []
        chunks: list[tuple[slice, list[int], list[int]]] = []
        for run in runs:
            start = len(positions)
            positions.extend(run.positions)
            depths.extend([run.depth or 0] * len(run.positions))
            table = pages.physical_table(run.request, run.depth)
            places, seen = _places(run, pages)
            if places is not None:
                writers.extend(range(start, len(positions)))
                slots.extend(table[at // pages.page_size] * pages.page_size + at % pages.page_size for at in places)
            if len(run.positions) <= FEW:
                singles.extend(range(start, len(positions)))
                tables.extend([table] * len(run.positions))
                seen_by_singles.extend(seen)
            else:
                chunks.append((slice(start, len(positions)), table, seen))
        self.positions, self.depths = on_device([positions, depths], device)
        self.writers = None if len(writers) == len(positions) else on_device(writers, device, torch.long)
        self.slots = on_device(slots, device, torch.long)
        packed = pages.positions if pages.is_packed and runs[0].depth is not None else None
        if packed is not None:
            packed.view(-1)[self.slots] = self.positions if self.writers is None else self.positions[self.writers]
        self.singles: Group | None = None
        if singles:
            index = on_device(singles, device, torch.long) if chunks else None
            self.singles = Group(self, index, tables, seen_by_singles, pages.page_size, packed)
        self.chunks = [Group(self, rows, [table], seen, pages.page_size, packed) for rows, table, seen in chunks]
        # Tables name pages in the layers' tensors, so to a kernel all rows are at a depth without an offset.
        self.no_depth = torch.zeros_like(self.depths) if kernels else self.depths

    def store(self, layer: PagedLayer, key: Tensor, value: Tensor) -> None:
        """Write ``key`` and ``value [N, K, D]`` to the rows' slots."""
        if self.writers is not None:
            key, value = key[self.writers], value[self.writers]
        if self.kernels:
            none = self.no_depth[: len(key)]
            store_keys_and_values(
                key, value, layer.keys, layer.values, self.slots, none, self.no_depth[:1], implementation="triton"
            )
            return
        for held, new in ((layer.keys, key), (layer.values, value)):
            held.view(-1, *held.shape[2:]).index_copy_(0, self.slots, new.to(held.dtype))

    def attend(self, layer: PagedLayer, query: Tensor, scale: float, softcap: float | None) -> Tensor:
        """``query [N, H, D]`` over the keys that the rows see: ``[N, H, D]``."""
        if self.singles is not None and not self.chunks:
            return self._attend_singles(layer, self.singles, query, scale, softcap)
        out = torch.empty_like(query)
        if self.singles is not None:
            here = self.singles.rows
            out[here] = self._attend_singles(layer, self.singles, query[here], scale, softcap)
        for chunk in self.chunks:
            out[chunk.rows] = attend_chunk(layer, chunk, query[chunk.rows], scale, softcap)
        return out

    def _attend_singles(
        self, layer: PagedLayer, group: Group, query: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        if not self.kernels:
            return attend_singles(layer, group, query, scale, softcap)
        none = self.no_depth[: len(query)]
        return attend_pages(
            query,
            layer.keys,
            layer.values,
            group.tables,
            none,
            none[:1],
            group.seen,
            scale=scale,
            window=group.reach(layer.windows),
            softcap=softcap,
            key_positions=group.packed,
            positions=None if group.packed is None else group.positions,
            implementation="triton",
        )


class Group:
    """Rows that are attended to in one call: each over pages of its own, or all over the same.

    Args:
        call: The rows of the call.
        rows: Which of them; None for all.
        tables: Physical pages, per row or one list for all.
        seen: How many keys each row sees, the first ones of its pages.
        page_size: Tokens per page.
        packed: See the attribute.

    Attributes:
        positions: Of the rows, ``[n]``.
        packed: By page and slot, the positions of keys, where slots are none: ``[pages, page_size]``.
        tables: ``[n, pages]`` or ``[1, pages]``; cut to what is seen, and filled up with page 0.
        pages: The same in one row.
        seen: ``[n]``.
    """

    def __init__(
        self,
        call: AttentionBatch,
        rows: Tensor | slice | None,
        tables: list[list[int]],
        seen: list[int],
        page_size: int,
        packed: Tensor | None,
    ) -> None:
        self.rows = rows
        every = slice(None) if rows is None else rows
        device = call.positions.device
        self.positions, self._depths, self.packed = call.positions[every], call.depths[every], packed
        width = -(-max(seen) // page_size)
        self.tables = on_device([(table + [0] * width)[:width] for table in tables], device, torch.long)
        self.pages = self.tables.flatten()
        self._index = torch.arange(width * page_size, device=device)
        self.seen = on_device(seen, device, torch.long)
        self._masks: dict[Any, Tensor] = {}
        self._reaches: dict[Any, Tensor | None] = {}

    def visible(self, windows: tuple[int | None, ...]) -> Tensor:
        """Which keys each row sees in a layer whose windows are, by depth, ``windows``: bool ``[n, L]``."""
        if windows not in self._masks:
            mask = self._index < self.seen[:, None]
            reach = self.reach(windows)
            if reach is not None:
                columns = self._index if self.packed is None else self.packed[self.tables].flatten(1)
                mask = mask & ((self.positions[:, None] - columns < reach[:, None]) | (reach[:, None] == 0))
            self._masks[windows] = mask
        return self._masks[windows]

    def reach(self, windows: tuple[int | None, ...]) -> Tensor | None:
        """How many positions each row sees in such a layer, ``[n]``, 0 for all; None where all rows see all."""
        if windows not in self._reaches:
            self._reaches[windows] = window_per_row(windows, self._depths)
        return self._reaches[windows]


def window_per_row(windows: tuple[int | None, ...], depths: Tensor) -> Tensor | None:
    """By row, how many positions it sees where windows are, by depth, ``windows``: ``[N]``, 0 for all; None if all do.

    Args:
        windows: One for all depths, or one for each.
        depths: Of the rows ``[N]``.
    """
    if not any(windows):
        return None
    reach = on_device([window or 0 for window in windows], depths.device, torch.long)
    return reach[depths] if len(windows) > 1 else reach.repeat(len(depths))


def _places(run: TokenSpan, pages: KVCache) -> tuple[Sequence[int] | None, list[int]]:
    """Where a run's keys go in its stream, None if it makes none; and how many keys each of its tokens sees."""
    depth = run.depth
    if depth is None or not pages.is_packed:
        return run.positions, [position + 1 for position in run.positions]
    home = 0 if pages.kv == "shared" else depth
    there = run.request.packed[home]
    seen = [bisect_right(there, position) for position in run.positions]
    return ([count - 1 for count in seen] if home == depth else None), seen
