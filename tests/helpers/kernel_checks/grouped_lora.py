"""Low-rank residuals by depth against their definition."""

from __future__ import annotations

import torch

from helpers.kernel_bench import Bench
from recursify.experiments.kernels.grouped_lora import add_depth_lora, reference

PLANTS = {
    "one row too few": ("m_n, m_o, m_q = o_n < N,", "m_n, m_o, m_q = o_n < N - 1,", "check_sizes"),
    "one output too few": ("o_o < OUT, o_q", "o_o < OUT - 1, o_q", "check_sizes"),
    "one input too many": ("m_i = k + o_i < IN", "m_i = k + o_i < IN + 1", "check_sizes"),
    "one rank too few": ("o_q < Q\n", "o_q < Q - 1\n", "check_sizes"),
    "one depth too few": ("in range(R):", "in range(R - 1):", "check_orders"),
    "rows of all depths": ("mask=m_level[:, None] & m_i", "mask=m_n[:, None] & m_i", "check_orders"),
}

RECURSIONS = 3


def compare(bench: Bench, rows: int, inputs: int, outputs: int, rank: int, depth: torch.Tensor | None = None) -> None:
    y, x = bench.randn(rows, outputs), bench.randn(rows, inputs)
    a = bench.guard(torch.randn(RECURSIONS, rank, inputs, generator=bench.generator).to(bench.dtype) / inputs**0.5)
    b = bench.guard(torch.randn(RECURSIONS, outputs, rank, generator=bench.generator).to(bench.dtype) / rank**0.5)
    if depth is None:
        depth = bench.randint(-1, RECURSIONS, rows)
        depth[-1] = RECURSIONS - 1
    expected = reference.by_slices(y.float(), x.float(), a.float(), b.float(), depth)
    found = add_depth_lora(y, x, a, b, depth, implementation="triton")
    assert found.data_ptr() == y.data_ptr()
    bench.assert_close(y, expected)


def check_sizes(bench: Bench) -> None:
    """Rows, features and ranks that no tile divides."""
    for rows, inputs, outputs, rank in ((1, 63, 65, 8), (63, 100, 64, 20), (70, 32, 1, 1), (2, 1000, 30, 64)):
        compare(bench, rows, inputs, outputs, rank)


def check_orders(bench: Bench) -> None:
    """Sorted, mixed, all of one depth, all of none."""
    for depth in ([0] * 30 + [1] * 40 + [2] * 10, [0, 1, 2, -1] * 20, [2] * 80, [-1] * 80):
        compare(bench, 80, 40, 20, 4, bench.integers(depth))
