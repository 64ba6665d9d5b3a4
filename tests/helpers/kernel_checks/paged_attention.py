"""Depth-paged attention against its definition."""

from __future__ import annotations

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.paged_attention import attend_pages

PLANTS = {
    "one key too many": ("m_t = o_t < end", "m_t = o_t <= end", "check_what_lies_beyond"),
    "one key too few": ("m_t = o_t < end", "m_t = o_t < end - 1", "check_odd_lengths"),
    "one column too many": ("G, o_d < D", "G, o_d < D + 1", "check_head_sizes"),
    "one head too few": ("o_g < L * G", "o_g < L * G - 1", "check_head_sizes"),
    "a row sees the next one's key": ("< b_length[:, None]", "<= b_length[:, None]", "check_groups"),
    "rows in one window": (">= b_first[:, None]", ">= first", "check_groups"),
    "one part too few": ("m_c, m_d = o_c < C", "m_c, m_d = o_c < C - 1", "check_parts"),
    "a window one too wide": ("b_length - b_width, 0", "b_length - b_width - 1, 0", "check_windows"),
    "a window of positions one too narrow": ("> b_oldest[:, None]", "> b_oldest[:, None] + 1", "check_packed_keys"),
    "no deeper than the row": ("tl.minimum(exited, own_depth)", "exited", "check_latest_keys"),
}

RECURSIONS, POOL = 3, 40


class AttentionBatch:
    """Random rows over random tables, with NaN in every slot that none of them sees.

    Args:
        lengths: Keys of each row.
    """

    def __init__(self, bench: Bench, lengths: list[int], *, heads=(4, 2), size=32, page_size=4, offsets=None):
        self.bench = bench
        rows, longest = len(lengths), max(lengths)
        blocks = max(1, -(-longest // page_size))
        self.lengths = bench.integers(lengths)
        self.depth = bench.randint(0, RECURSIONS, rows)
        self.offsets = bench.integers(offsets or [depth * POOL for depth in range(RECURSIONS)])
        # Rows share pages, as those of one prompt do. Behind a row's last page stands a page that no row has.
        self.table = bench.randint(0, POOL - 1, rows, blocks)
        needed = (self.lengths + page_size - 1) // page_size
        beyond = torch.arange(blocks, device=bench.device) >= needed[:, None]
        self.table = bench.guard(self.table.masked_fill(beyond, POOL - 1))
        self.query = bench.randn(rows, heads[0], size)
        pages = int(self.offsets.max()) + POOL
        keys, values = (torch.randn(pages, page_size, heads[1], size, generator=bench.generator) for _ in range(2))
        for offset in self.offsets.tolist():
            keys[offset + POOL - 1] = values[offset + POOL - 1] = float("nan")
        self.keys, self.values = (bench.guard(held.to(bench.dtype)) for held in (keys, values))

    def compare(self, *, num_splits=None, **settings) -> None:
        places = (self.table, self.depth, self.offsets, self.lengths)
        pages = (self.keys, self.values)
        found = attend_pages(self.query, *pages, *places, num_splits=num_splits, implementation="triton", **settings)
        floats = (self.query.float(), *(held.float() for held in pages))
        expected = attend_pages(*floats, *places, implementation="reference", **settings)
        assert not expected.isnan().any()
        self.bench.assert_close(found, expected)


def check_odd_lengths(bench: Bench) -> None:
    """Rows at all depths, of lengths that no page and no tile divides; one sees nothing and is 0."""
    AttentionBatch(bench, [1, 63, 0, 64, 65, 7]).compare()
    AttentionBatch(bench, [5, 100], page_size=16).compare()


def check_what_lies_beyond(bench: Bench) -> None:
    """Slots behind the last key are not read, in its own page either: an older sequence may have left anything."""
    rows = AttentionBatch(bench, [5], offsets=[0, 0, 0])
    rows.table[0] = bench.integers([3, 7])
    rows.keys[7, 1:] = rows.values[7, 1:] = float("nan")
    rows.compare()


def check_head_sizes(bench: Bench) -> None:
    """Powers of two and others; one query head per key head, or several that fill no tile."""
    for heads, size in (((2, 2), 64), ((6, 2), 80), ((7, 1), 96), ((2, 1), 256)):
        AttentionBatch(bench, [3, 40], heads=heads, size=size).compare()


def check_parts(bench: Bench) -> None:
    """Keys shared out, also into more parts than there are tiles."""
    for splits in (2, 3, 8):
        AttentionBatch(bench, [1, 130, 63, 0]).compare(num_splits=splits)


def check_windows(bench: Bench) -> None:
    """One for all rows, one for each, wider than the row, and in parts; scores soft-capped beside it."""
    AttentionBatch(bench, [1, 10, 70]).compare(window=10)
    AttentionBatch(bench, [40, 70]).compare(window=1, num_splits=2)
    rows = AttentionBatch(bench, [9, 33, 70, 12])
    rows.compare(window=bench.integers([4, 40, 0, 1]))
    rows.compare(window=33, softcap=2.0, scale=0.5)


def check_latest_keys(bench: Bench) -> None:
    """Keys are where a token had them last, but no deeper than the row."""
    rows = AttentionBatch(bench, [11, 50, 64])
    rows.depth[:] = bench.integers([0, 1, 2])
    for dtype in (torch.int8, torch.int32):
        rows.compare(exit_depths=bench.randint(0, RECURSIONS, POOL, 4, dtype=dtype))
    rows.compare(exit_depths=bench.randint(0, RECURSIONS, POOL, 4), window=17, num_splits=2)


def check_shared_keys(bench: Bench) -> None:
    """All depths read the first one's."""
    AttentionBatch(bench, [17, 30], offsets=[0, 0, 0]).compare()


def check_groups(bench: Bench) -> None:
    """Rows of a prompt, which share a table and a depth: alone, in parts, in windows, filled up."""
    for heads in ((4, 2), (3, 1)):
        rows = AttentionBatch(bench, [61, 62, 63, 64, 12, 13, 14, 0], heads=heads)
        for begin in (0, 4):
            longest = begin + int(rows.lengths[begin : begin + 4].argmax())
            rows.table[begin : begin + 4] = rows.table[longest].clone()
            rows.depth[begin : begin + 4] = rows.depth[begin].clone()
        rows.compare(group=4)
        rows.compare(group=2, num_splits=3)
        rows.compare(group=4, window=10)
        rows.compare(group=4, window=bench.integers([1, 5, 0, 30, 3, 2, 90, 1]), num_splits=2)
        rows.compare(group=4, exit_depths=bench.randint(0, RECURSIONS, POOL, 4), softcap=3.0)


def check_packed_keys(bench: Bench) -> None:
    """Offsets are sums of unlike counts, and windows go by position, which slots are not."""
    rows = AttentionBatch(bench, [20, 45, 70], offsets=[0, 45, 90])
    positions = bench.integers([60, 100, 300])
    # At the ends of the windows below, and at both sides of them.
    ends = bench.integers([35, 36, 37, 75, 76, 77, 210, 211, 275, 276])
    held = ends[bench.randint(0, len(ends), len(rows.keys), 4).long()]
    for window in (25, 301, bench.integers([25, 0, 90])):
        rows.compare(window=window, key_positions=held, positions=positions)
        rows.compare(window=window, key_positions=held, positions=positions, num_splits=2)
    rows.table[:], rows.depth[:] = rows.table[2].clone(), 1
    rows.compare(group=3, window=25, key_positions=held, positions=positions)
