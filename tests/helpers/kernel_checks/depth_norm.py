"""Residual and norm with a weight per depth against their reference."""

from __future__ import annotations

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.depth_norm import add_and_norm

PLANTS = {
    "one column too many": ("m_h = o_h < H", "m_h = o_h < H + 1", "check_odd_sizes"),
    "one column too few": ("m_h = o_h < H", "m_h = o_h < H - 1", "check_odd_sizes"),
    "the weight of the first depth": ("at * stride_weight", "0 * stride_weight", "check_odd_sizes"),
}


def compare(bench: Bench, rows: int, size: int, *, residual=True, adds_one=False, weight_dtype=None) -> None:
    states, weight = bench.randn(rows, size), bench.randn(4, size, dtype=weight_dtype)
    added = bench.randn(rows, size) if residual else None
    depth = bench.randint(1, 4, rows)
    settings = {"eps": 1e-3, "adds_one": adds_one}
    total, normed = add_and_norm(states, added, weight, depth, **settings, implementation="triton")
    # The norm is that of the sum as stored, so the reference gets the stored sum.
    stored = states if added is None else states + added
    assert torch.equal(total, stored)
    expected = add_and_norm(stored.float(), None, weight.float(), depth, **settings, implementation="reference")
    bench.assert_close(normed, expected[1])


def check_odd_sizes(bench: Bench) -> None:
    """Odd numbers of rows and columns."""
    for rows, size in ((1, 1), (5, 63), (63, 64), (2, 1000)):
        compare(bench, rows, size)


def check_forms(bench: Bench) -> None:
    """No residual, Gemma's scale, and a weight of another dtype."""
    compare(bench, 3, 40, residual=False)
    compare(bench, 3, 40, adds_one=True)
    compare(bench, 3, 40, adds_one=True, residual=False, weight_dtype=torch.float32)


def check_strides(bench: Bench) -> None:
    """Rows of wider matrices."""
    wide, weights = bench.randn(5, 2, 30), bench.randn(3, 2, 30)
    depth = bench.randint(0, 3, 5)
    arguments = (wide[:, 0], wide[:, 1], weights[:, 1], depth)
    total, normed = add_and_norm(*arguments, implementation="triton")
    assert torch.equal(total, wide[:, 0] + wide[:, 1])
    expected = add_and_norm(total.float(), None, arguments[2].float(), depth, implementation="reference")[1]
    bench.assert_close(normed, expected)
