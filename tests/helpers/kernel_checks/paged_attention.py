"""Depth-paged attention against its reference."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from unittest.mock import patch

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.paged_attention import attend_pages

PLANTS = {
    "one key too many": ("m_t = o_t < end", "m_t = o_t <= end", "check_what_lies_beyond"),
    "one key too few": ("m_t = o_t < end", "m_t = o_t < end - 1", "check_odd_lengths"),
    "one column too many": ("G, o_d < D", "G, o_d < D + 1", "check_head_sizes"),
    "one head too few": ("o_g < G", "o_g < G - 1", "check_head_sizes"),
    "one part too few": ("m_c, m_d = o_c < C", "m_c, m_d = o_c < C - 1", "check_parts"),
    "a window one too wide": ("length - width, 0", "length - width - 1, 0", "check_windows"),
    "a window of positions one too narrow": ("> oldest)", "> oldest + 1)", "check_packed_keys"),
    "pages of the first depth": ("page_offsets + own_depth", "page_offsets + 0", "check_odd_lengths"),
}

RECURSIONS, POOL = 3, 40


class Rows:
    """Random rows over random tables, with NaN in a page that no row may read.

    Args:
        lengths: Number of keys of each row.
    """

    def __init__(self, bench: Bench, lengths: list[int], *, heads=(4, 2), size=32, page_size=4, offsets=None):
        self.bench = bench
        rows, longest = len(lengths), max(lengths)
        blocks = max(1, -(-longest // page_size))
        self.lengths = bench.integers(lengths)
        self.depth = bench.randint(0, RECURSIONS, rows)
        self.depth[0] = RECURSIONS - 1
        self.offsets = bench.integers(offsets or [depth * POOL for depth in range(RECURSIONS)])
        # Rows share pages, as those of one prompt do. A row's table ends with a page that belongs to no row.
        self.table = bench.randint(0, POOL - 1, rows, blocks)
        needed = (self.lengths + page_size - 1) // page_size
        beyond = torch.arange(blocks, device=bench.device) >= needed[:, None]
        self.table = bench.guard(self.table.masked_fill(beyond, POOL - 1))
        self.query = bench.randn(rows, heads[0], size)
        pages = int(self.offsets.max()) + POOL
        keys, values = (torch.randn(pages, page_size, heads[1], size, generator=bench.generator) for _ in range(2))
        for offset in self.offsets.tolist():
            keys[offset + POOL - 1] = values[offset + POOL - 1] = float("nan")
        self.keys, self.values = (bench.guard(tensor.to(bench.dtype)) for tensor in (keys, values))

    def compare(self, *, parts: int | None = None, **settings) -> None:
        """Triton against the reference, with the keys split into ``parts`` or as the launcher chooses."""
        targets = (self.table, self.depth, self.offsets, self.lengths)
        pages = (self.keys, self.values)
        launcher = importlib.import_module("recursify.kernels.paged_attention.triton")
        with patch.object(launcher, "num_parts", lambda *_: parts) if parts else nullcontext():
            found = attend_pages(self.query, *pages, *targets, implementation="triton", **settings)
        floats = (self.query.float(), *(tensor.float() for tensor in pages))
        expected = attend_pages(*floats, *targets, implementation="reference", **settings)
        assert not expected.isnan().any()
        self.bench.assert_close(found, expected)


def check_odd_lengths(bench: Bench) -> None:
    """Rows at all depths, with lengths that are no multiple of a page or tile; a row of length 0 gives 0."""
    Rows(bench, [1, 63, 0, 64, 65, 7]).compare()
    Rows(bench, [5, 100], page_size=16).compare()


def check_what_lies_beyond(bench: Bench) -> None:
    """Slots after the last key are not read, nor those in the same page: they hold keys of older sequences."""
    rows = Rows(bench, [5], offsets=[0, 0, 0])
    rows.table[0] = bench.integers([3, 7])
    rows.keys[7, 1:] = rows.values[7, 1:] = float("nan")
    rows.compare()


def check_head_sizes(bench: Bench) -> None:
    """Powers of two and other sizes; one query head per key head, or several that do not fill a tile."""
    for heads, size in (((2, 2), 64), ((6, 2), 80), ((7, 1), 96), ((2, 1), 256)):
        Rows(bench, [3, 40], heads=heads, size=size).compare()


def check_parts(bench: Bench) -> None:
    """Keys split into parts, also into more parts than there are tiles."""
    for parts in (2, 3, 8):
        Rows(bench, [1, 130, 63, 0]).compare(parts=parts)


def check_windows(bench: Bench) -> None:
    """One window for all rows, one per row, windows wider than the row, and in parts; with soft-capped scores."""
    Rows(bench, [1, 10, 70]).compare(window=10)
    Rows(bench, [40, 70]).compare(window=1, parts=2)
    rows = Rows(bench, [9, 33, 70, 12])
    rows.compare(window=bench.integers([4, 40, 0, 1]))
    rows.compare(window=33, softcap=2.0, scale=0.5)


def check_shared_keys(bench: Bench) -> None:
    """All depths read the keys of the first one."""
    Rows(bench, [17, 30], offsets=[0, 0, 0]).compare()


def check_packed_keys(bench: Bench) -> None:
    """Offsets are sums of different page counts, and windows are measured in positions, not in slots."""
    rows = Rows(bench, [20, 45, 70], offsets=[0, 45, 90])
    positions = bench.integers([60, 100, 300])
    # Positions at the edges of the windows below, and on both sides of them.
    ends = bench.integers([35, 36, 37, 75, 76, 77, 210, 211, 275, 276])
    key_positions = ends[bench.randint(0, len(ends), len(rows.keys), 4).long()]
    for window in (25, 301, bench.integers([25, 0, 90])):
        rows.compare(window=window, key_positions=key_positions, positions=positions)
        rows.compare(window=window, key_positions=key_positions, positions=positions, parts=2)
