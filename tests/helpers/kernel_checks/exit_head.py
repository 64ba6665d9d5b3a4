"""The exit head against its definition."""

from __future__ import annotations

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.exit_head import exit_statistics

PLANTS = {
    "one entry too many": ("m_v = o_v < V", "m_v = o_v < V + 1", "check_part_of_the_vocabulary"),
    "one entry too few": ("m_v = o_v < V", "m_v = o_v < V - 1", "check_ties_go_to_the_first"),
    "one column too many": ("m_h = k + o_h < H", "m_h = k + o_h < H + 1", "check_odd_sizes"),
    "one row too many": ("m_n = o_n < N", "m_n = o_n < N + 1", "check_odd_sizes"),
    "one part too few": ("m_p = o_p < P", "m_p = o_p < P - 1", "check_odd_sizes"),
    "the last of equals": ("top > first", "top >= first", "check_ties_go_to_the_first"),
}


def compare(bench: Bench, rows: int, size: int, entries: int, *, bias=False, softcap=None, vocabulary=None) -> None:
    states, weight = bench.randn(rows, size), bench.randn(entries, size)
    offset = bench.randn(entries) if bias else None
    found = exit_statistics(states, weight, offset, softcap=softcap, vocabulary=vocabulary, implementation="triton")
    as_float = (states.float(), weight.float(), None if offset is None else offset.float())
    expected = exit_statistics(*as_float, softcap=softcap, vocabulary=vocabulary, implementation="reference")
    for name in ("top1", "top2", "log_sum_exp", "entropy", "margin", "probability_margin"):
        bench.assert_close(getattr(found, name), getattr(expected, name), factor=10 if name == "entropy" else 1)
    # Two entries may be nearer to one another than rounding; either is right then.
    clear = expected.margin > 1e-3
    assert torch.equal(found.choice[clear], expected.choice[clear])


def check_odd_sizes(bench: Bench) -> None:
    """Rows, columns and entries that no tile divides."""
    for rows, size, entries in ((1, 64, 1000), (63, 33, 63), (3, 70, 129), (70, 16, 37)):
        compare(bench, rows, size, entries)


def check_bias_and_softcap(bench: Bench) -> None:
    """Each and both, with logits far beyond the cap."""
    compare(bench, 2, 40, 200, bias=True)
    compare(bench, 2, 40, 300, softcap=5.0)
    compare(bench, 2, 40, 300, bias=True, softcap=30.0)


def check_part_of_the_vocabulary(bench: Bench) -> None:
    """The entries after it have no say, though their logits are higher than any."""
    for vocabulary in (2, 333):
        weight = torch.randn(400, 32, generator=bench.generator).to(bench.dtype)
        states = bench.guard(weight[vocabulary : vocabulary + 1] * 4)
        found = exit_statistics(states, bench.guard(weight), vocabulary=vocabulary, implementation="triton")
        expected = exit_statistics(states.float(), weight[:vocabulary].to(states).float(), implementation="reference")
        bench.assert_close(found.log_sum_exp, expected.log_sum_exp)


def check_one_entry(bench: Bench) -> None:
    """It is certain, and there is no second."""
    found = exit_statistics(bench.randn(3, 20), bench.randn(1, 20), implementation="triton")
    assert found.choice.tolist() == [0, 0, 0]
    assert found.top2.isneginf().all()
    bench.assert_close(found.entropy, torch.zeros(3))


def check_ties_go_to_the_first(bench: Bench) -> None:
    """Whole numbers, so logits are exact; the highest stands in one tile, in tiles of one part, and in others."""
    states = bench.guard(torch.ones(2, 16, dtype=bench.dtype))
    for entries in (129, 1000):
        weight = bench.randint(-2, 2, entries, 16).to(bench.dtype)
        for places in ([entries - 1], [5, 6, entries - 1], [5, entries // 5, entries - 1]):
            weight[places] = 3.0
            found = exit_statistics(states, bench.guard(weight), implementation="triton")
            assert found.choice.tolist() == [places[0]] * 2, places
            assert (found.top1 == 48).all()
            assert ((found.top2 == 48) == (len(places) > 1)).all()
            weight[places] = -1.0


def check_strides(bench: Bench) -> None:
    """Rows of a wider matrix, and a weight that lies the other way."""
    wide, turned = bench.randn(5, 96), bench.randn(48, 200).T
    found = exit_statistics(wide[:, :48], turned, implementation="triton")
    expected = exit_statistics(wide[:, :48].float(), turned.float(), implementation="reference")
    bench.assert_close(found.log_sum_exp, expected.log_sum_exp)
