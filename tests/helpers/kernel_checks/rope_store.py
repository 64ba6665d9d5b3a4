"""RoPE and the store into pages against their definition."""

from __future__ import annotations

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.rope_store import store_keys_and_values

PLANTS = {
    "one column too many": ("m_d = o_d < D", "m_d = o_d < D + 1", "check_sizes"),
    "one column too few": ("m_d = o_d < D", "m_d = o_d < D - 1", "check_sizes"),
    "one rotated column too few": ("m_e = o_d < E", "m_e = o_d < E - 1", "check_sizes"),
    "halves divided one too early": ("tl.where(o_d < E // 2, -", "tl.where(o_d < E // 2 - 1, -", "check_sizes"),
    "one depth too many": ("tl.int32), R)", "tl.int32) + 1, R)", "check_depths"),
    "a row that writes nothing writes": ("if slot < 0:", "if slot < -1:", "check_depths"),
}

RECURSIONS, POOL, PAGE = 3, 20, 4


def compare(
    bench: Bench, rows: int, heads: int, size: int, rotary: int, *, count=None, offsets=None, silent=()
) -> None:
    offsets = bench.integers(offsets or [depth * POOL for depth in range(RECURSIONS)])
    wide = bench.randn(rows, 2, heads, size)  # keys beside values, as one product makes them
    key, value = wide[:, 0], wide[:, 1]
    slots = bench.permutation(POOL * PAGE - PAGE)[:rows] + PAGE
    slots[list(silent)] = -1
    depth = bench.randint(0, RECURSIONS, rows)
    angles = torch.randn(rows, rotary // 2, generator=bench.generator).repeat(1, 2)
    rotation = {"cos": bench.guard(angles.cos()), "sin": bench.guard(angles.sin())} if rotary else {}
    shape = (int(offsets.max()) + POOL, PAGE, heads, size)
    held = [bench.guard(torch.zeros(shape, dtype=bench.dtype)) for _ in range(2)]
    expected = [torch.zeros(shape, device=bench.device) for _ in range(2)]
    places = (slots, depth, offsets)
    store_keys_and_values(key, value, *held, *places, count=count, **rotation, implementation="triton")
    floats = (key.float(), value.float())
    store_keys_and_values(*floats, *expected, *places, count=count, **rotation, implementation="reference")
    for found, wanted in zip(held, expected, strict=True):
        bench.assert_close(found, wanted)


def check_sizes(bench: Bench) -> None:
    """Rotated whole, in part or not at all; sizes of heads that are no powers of two."""
    for heads, size, rotary in ((1, 64, 64), (2, 80, 32), (3, 24, 0), (1, 16, 2), (2, 6, 6)):
        compare(bench, 7, heads, size, rotary)
    compare(bench, 63, 1, 8, 4)
    compare(bench, 1, 1, 8, 8)


def check_depths(bench: Bench) -> None:
    """At no depth, one, or several, as far as there are any; rows without a slot write nothing."""
    compare(bench, 20, 2, 8, 8, count=bench.randint(0, RECURSIONS + 2, 20), silent=(0, 3, 19))
    compare(bench, 20, 2, 8, 0, count=bench.randint(0, RECURSIONS + 2, 20), offsets=[0, 30, 55], silent=(5,))
