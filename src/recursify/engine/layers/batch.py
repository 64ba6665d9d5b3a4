"""Attention batch: positions, block tables, masks and KV slots of the rows of one call.

It is built once per call and used by every layer in it.

Shape legend: N rows, n rows in a group, L keys, H query heads, K key heads, D head size.
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

MAX_SINGLE_ROWS = 4
"""Spans up to this length are attended row by row; longer ones (prompt chunks) gather their keys once."""


@dataclass
class TokenSpan:
    """Tokens of one request that run the same layers at the same depth.

    Attributes:
        request: Request of the tokens.
        depth: Depth of the block; None in prelude and coda.
        positions: Ascending positions of the tokens.
    """

    request: Request
    depth: int | None
    positions: Sequence[int]


class AttentionBatch:
    """Rows of ``spans``, which are sorted by depth.

    Attributes:
        kernels: True to use Triton for KV-cache writes, and for attention of rows with a block table of their own.
        only_writes: True to end every layer after its KV-cache write.
        positions: Positions ``[N]``.
        depths: Depths ``[N]``; 0 in prelude and coda.
        writers: Rows that write keys and values; None for all. With ``shared`` keys only those at depth 0 do.
        slots: KV slots of the writers.
        singles: Rows with a block table of their own; None if there are none.
        chunks: Groups of the other rows, one per span.
        rope_lengths: Length of the sequence by which each row is rotated; None where that does not depend on it.
    """

    def __init__(
        self, spans: Sequence[TokenSpan], kv_cache: KVCache, *, kernels: bool = False, only_writes: bool = False
    ) -> None:
        self.kernels, self.only_writes = kernels, only_writes
        rope = kv_cache.decoder.length_rope
        self.rope_lengths = None if rope is None else rope.lengths(spans)
        device, page_size = kv_cache.decoder.device, kv_cache.page_size
        positions: list[int] = []
        depths: list[int] = []
        writers: list[int] = []
        slots: list[int] = []
        singles: list[int] = []
        tables: list[list[int]] = []
        single_lengths: list[int] = []
        chunks: list[tuple[slice, list[int], list[int]]] = []
        for span in spans:
            start = len(positions)
            positions.extend(span.positions)
            depths.extend([span.depth or 0] * len(span.positions))
            table = kv_cache.block_table(span.request, span.depth)
            indices, lengths = _key_indices(span, kv_cache)
            if indices is not None:
                writers.extend(range(start, len(positions)))
                slots.extend(table[index // page_size] * page_size + index % page_size for index in indices)
            if len(span.positions) <= MAX_SINGLE_ROWS:
                singles.extend(range(start, len(positions)))
                tables.extend([table] * len(span.positions))
                single_lengths.extend(lengths)
            else:
                chunks.append((slice(start, len(positions)), table, lengths))
        self.positions, self.depths = on_device([positions, depths], device)
        self.writers = None if len(writers) == len(positions) else on_device(writers, device, torch.long)
        self.slots = on_device(slots, device, torch.long)
        key_positions = kv_cache.positions if kv_cache.is_packed and spans[0].depth is not None else None
        if key_positions is not None:
            written = self.positions if self.writers is None else self.positions[self.writers]
            key_positions.view(-1)[self.slots] = written
        self.singles: AttentionGroup | None = None
        if singles:
            rows = on_device(singles, device, torch.long) if chunks else None
            self.singles = AttentionGroup(self, rows, tables, single_lengths, page_size, key_positions)
        self.chunks = [
            AttentionGroup(self, rows, [table], lengths, page_size, key_positions) for rows, table, lengths in chunks
        ]
        # Block tables already contain the depths' offsets, so for a kernel all rows are at a depth without one.
        self.no_depth = torch.zeros_like(self.depths) if kernels else self.depths

    def store(self, layer: PagedLayer, key: Tensor, value: Tensor) -> None:
        """Write ``key`` and ``value [N, K, D]`` to the rows' KV slots."""
        if self.writers is not None:
            key, value = key[self.writers], value[self.writers]
        if self.kernels:
            depths = self.no_depth[: len(key)]
            store_keys_and_values(
                key, value, layer.keys, layer.values, self.slots, depths, self.no_depth[:1], implementation="triton"
            )
            return
        for cache, new in ((layer.keys, key), (layer.values, value)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, self.slots, new.to(cache.dtype))

    def attend(self, layer: PagedLayer, query: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attend with ``query [N, H, D]`` to the rows' visible keys: ``[N, H, D]``."""
        if self.singles is not None and not self.chunks:
            return self._attend_singles(layer, self.singles, query, scale, softcap)
        out = query.new_empty(*query.shape[:2], layer.values.shape[-1])
        if self.singles is not None:
            rows = self.singles.rows
            out[rows] = self._attend_singles(layer, self.singles, query[rows], scale, softcap)
        for chunk in self.chunks:
            out[chunk.rows] = attend_chunk(layer, chunk, query[chunk.rows], scale, softcap)
        return out

    def _attend_singles(
        self, layer: PagedLayer, group: AttentionGroup, query: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        if not self.kernels:
            return attend_singles(layer, group, query, scale, softcap)
        depths = self.no_depth[: len(query)]
        return attend_pages(
            *(query, layer.keys, layer.values, group.tables, depths, depths[:1], group.lengths),
            scale=scale,
            window=group.window(layer.windows),
            softcap=softcap,
            key_positions=group.key_positions,
            positions=None if group.key_positions is None else group.positions,
            implementation="triton",
        )


class AttentionGroup:
    """Rows that attend in one call: each over its own pages, or all over the same ones.

    Attributes:
        rows: Rows of the batch; None for all.
        positions: Positions ``[n]`` of the rows.
        key_positions: Positions ``[pages, page_size]`` of the keys; None where KV slots are positions.
        tables: Block tables ``[n, pages]`` or ``[1, pages]``, cut to the visible keys and padded with page 0.
        pages: Flattened ``tables``.
        lengths: Numbers of visible keys ``[n]``, counted from the start of the pages.
    """

    def __init__(
        self,
        batch: AttentionBatch,
        rows: Tensor | slice | None,
        tables: list[list[int]],
        lengths: list[int],
        page_size: int,
        key_positions: Tensor | None,
    ) -> None:
        self.rows = rows
        selected = slice(None) if rows is None else rows
        device = batch.positions.device
        self.positions, self._depths = batch.positions[selected], batch.depths[selected]
        self.key_positions = key_positions
        width = -(-max(lengths) // page_size)
        self.tables = on_device([(table + [0] * width)[:width] for table in tables], device, torch.long)
        self.pages = self.tables.flatten()
        self._index = torch.arange(width * page_size, device=device)
        self.lengths = on_device(lengths, device, torch.long)
        self._masks: dict[Any, Tensor] = {}
        self._windows: dict[Any, Tensor | None] = {}

    def visible(self, windows: tuple[int | None, ...]) -> Tensor:
        """Mask of the keys that each row sees in a layer with these ``windows`` by depth: bool ``[n, L]``."""
        if windows not in self._masks:
            mask = self._index < self.lengths[:, None]
            window = self.window(windows)
            if window is not None:
                columns = self._index if self.key_positions is None else self.key_positions[self.tables].flatten(1)
                mask = mask & ((self.positions[:, None] - columns < window[:, None]) | (window[:, None] == 0))
            self._masks[windows] = mask
        return self._masks[windows]

    def window(self, windows: tuple[int | None, ...]) -> Tensor | None:
        """Window of each row in such a layer, see :func:`window_per_row`."""
        if windows not in self._windows:
            self._windows[windows] = window_per_row(windows, self._depths)
        return self._windows[windows]


def window_per_row(windows: tuple[int | None, ...], depths: Tensor) -> Tensor | None:
    """Window of each row, ``[N]``, by its depth in ``depths [N]``; 0 for none, None if no row has one.

    ``windows`` has one entry per depth, or a single one for all depths.
    """
    if not any(windows):
        return None
    by_depth = on_device([window or 0 for window in windows], depths.device, torch.long)
    return by_depth[depths] if len(windows) > 1 else by_depth.repeat(len(depths))


def _key_indices(span: TokenSpan, kv_cache: KVCache) -> tuple[Sequence[int] | None, list[int]]:
    """Indices of a span's keys in its stream, None if it writes none, and the number of keys that each token sees."""
    depth = span.depth
    if depth is None or not kv_cache.is_packed:
        return span.positions, [position + 1 for position in span.positions]
    home = 0 if kv_cache.kv == "shared" else depth
    packed = span.request.packed[home]
    lengths = [bisect_right(packed, position) for position in span.positions]
    return ([length - 1 for length in lengths] if home == depth else None), lengths
