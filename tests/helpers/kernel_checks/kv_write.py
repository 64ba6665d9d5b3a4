"""The KV-cache write against its reference."""

from __future__ import annotations

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.kv_write import store_keys_and_values

PLANTS = {
    "one column too many": ("m_d = o_d < D", "m_d = o_d < D + 1", "check_sizes"),
    "one column too few": ("m_d = o_d < D", "m_d = o_d < D - 1", "check_sizes"),
    "pages of the first depth": ("page_offsets + level", "page_offsets + 0", "check_depths"),
    "a row that writes nothing writes": ("if slot < 0:", "if slot < -1:", "check_depths"),
}

RECURSIONS, POOL, PAGE = 3, 20, 4


def compare(bench: Bench, rows: int, heads: int, size: int, *, offsets=None, silent=()) -> None:
    offsets = bench.integers(offsets or [depth * POOL for depth in range(RECURSIONS)])
    wide = bench.randn(rows, 2, heads, size)  # keys beside values, as one product makes them
    key, value = wide[:, 0], wide[:, 1]
    slots = bench.permutation(POOL * PAGE - PAGE)[:rows] + PAGE
    slots[list(silent)] = -1
    depth = bench.randint(0, RECURSIONS, rows)
    depth[-1] = RECURSIONS - 1
    shape = (int(offsets.max()) + POOL, PAGE, heads, size)
    found = [bench.guard(torch.zeros(shape, dtype=bench.dtype)) for _ in range(2)]
    expected = [torch.zeros(shape, dtype=bench.dtype, device=bench.device) for _ in range(2)]
    targets = (slots, depth, offsets)
    store_keys_and_values(key, value, *found, *targets, implementation="triton")
    store_keys_and_values(key, value, *expected, *targets, implementation="reference")
    for pages, expected_pages in zip(found, expected, strict=True):
        assert torch.equal(pages, expected_pages)


def check_sizes(bench: Bench) -> None:
    """Numbers of rows and heads, and head sizes that are not powers of two."""
    for heads, size in ((1, 64), (2, 80), (3, 24), (1, 16), (2, 6)):
        compare(bench, 7, heads, size)
    compare(bench, 63, 1, 8)
    compare(bench, 1, 1, 8)


def check_depths(bench: Bench) -> None:
    """Pages per depth, shared and packed ones; rows without a slot write nothing."""
    compare(bench, 20, 2, 8, silent=(0, 3, 18))
    compare(bench, 20, 2, 8, offsets=[0, 30, 55], silent=(5,))
    compare(bench, 20, 2, 8, offsets=[0, 0, 0])
