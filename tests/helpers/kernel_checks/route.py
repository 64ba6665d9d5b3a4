"""Gather and scatter of a routed recursion against their references."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.kernel_bench import Bench
from recursify.experiments.kernels.route import gather_normed, scatter_gated

PLANTS = {
    "one column too many": ("m_h = o_h < H", "m_h = o_h < H + 1", "check_gather"),
    "one column too few": ("m_h = o_h < H", "m_h = o_h < H - 1", "check_scatter"),
    "a row that is none is read": ("tl.where(row >= 0, H", "tl.where(row >= -1, H", "check_gather"),
    "a row that is none is written": ("if row < 0:", "if row < -1:", "check_scatter"),
}


def chosen(bench: Bench, total: int, count: int) -> torch.Tensor:
    """``count`` row numbers below ``total`` in random order, one of them negative if there are several."""
    rows = bench.permutation(total)[:count]
    if count > 1:
        rows[1] = -1
    return rows


def check_gather(bench: Bench) -> None:
    """Odd sizes, with and without a weight."""
    for total, count, size in ((1, 1, 1), (90, 63, 33), (9, 4, 1000)):
        states, rows = bench.randn(total, size), chosen(bench, total, count)
        for weight in (None, bench.randn(size)):
            found = gather_normed(states, rows, weight, eps=1e-4, implementation="triton")
            as_float = None if weight is None else weight.float()
            expected = gather_normed(states.float(), rows, as_float, eps=1e-4, implementation="reference")
            assert torch.equal(found[0].float(), expected[0])
            bench.assert_close(found[1], expected[1])


def check_gather_scales_as_a_router(bench: Bench) -> None:
    """The default is ``rms_norm``, here of rows of a wider matrix."""
    states, rows = bench.randn(12, 2, 40)[:, 1], bench.permutation(12)[:5]
    found = gather_normed(states, rows, implementation="triton")[1]
    bench.assert_close(found, F.rms_norm(states[rows.long()], (40,)))


def check_scatter(bench: Bench) -> None:
    """Both gates; other rows do not change."""
    for kind in ("residual", "mor"):
        for total, count, size in ((1, 1, 1), (90, 63, 33), (9, 4, 1000)):
            whole, made = bench.randn(total + 1, size), bench.randn(count, size)
            before, states = whole[0].clone(), whole[1:]
            rows, gate = chosen(bench, total, count), bench.randn(count, dtype=torch.float32)
            floats = (states.float().clone(), made.float(), gate, rows)
            expected = scatter_gated(*floats, kind=kind, implementation="reference")
            found = scatter_gated(states, made, gate, rows, kind=kind, implementation="triton")
            assert found.data_ptr() == states.data_ptr()
            bench.assert_close(states, expected)
            assert torch.equal(whole[0], before), "a row before the first"


def check_a_gate_of_zero_changes_no_bit(bench: Bench) -> None:
    """A residual gate of 0 returns the output of the block unchanged."""
    states, made, rows = bench.randn(6, 50), bench.randn(4, 50), bench.permutation(6)[:4]
    scatter_gated(states, made, torch.zeros(4, device=bench.device), rows, implementation="triton")
    assert torch.equal(states[rows.long()], made)
