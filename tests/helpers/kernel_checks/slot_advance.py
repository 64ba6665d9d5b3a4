"""The state machine of slots against its definition."""

from __future__ import annotations

from dataclasses import fields

import torch

from helpers.kernel_bench import Bench
from recursify.kernels.slot_advance import OutputRing, Slots, advance_slots

DTYPES = (torch.float32,)  # there are no floats in it

PLANTS = {
    "one slot too few": ("m_s = o_s < S", "m_s = o_s < S - 1", "check_iterations"),
    "one slot too many": ("m_s = o_s < S", "m_s = o_s < S + 1", "check_iterations"),
    "one page too many": ("(page < M)", "(page <= M)", "check_pages_run_out"),
    "one ending too few": ("in range(E):", "in range(E - 1):", "check_endings"),
    "one position too many": ("b_position >= tl.load(limits", "b_position > tl.load(limits", "check_iterations"),
    "one entry too far": ("axis=0) - 1", "axis=0)", "check_iterations"),
    "who waits goes on": ("b_moves = b_active & (", "b_moves = b_active | (", "check_waiting"),
    "never by itself": ("b_depth == DEPTHS - 1", "b_depth == DEPTHS", "check_iterations"),
}

PAGE, DEPTHS = 4, 3


def guarded(bench: Bench, held):
    """A copy of ``held`` whose tensors lie between guards."""
    return type(held)(*(bench.guard(getattr(held, field.name).to(bench.device)) for field in fields(held)))


class Batch:
    """The same slots twice: for the kernel, and for its definition."""

    def __init__(self, bench: Bench, count: int, *, capacity: int, pages: int = 10):
        self.bench, self.count = bench, count
        slots = Slots.empty(count)
        slots.active.copy_(bench.randint(0, 4, count) > 0)
        slots.depth.copy_(bench.randint(0, DEPTHS, count))
        slots.position.copy_(bench.randint(0, 5, count))
        # Not all of them begin where they were put: addresses are written anew.
        self.found = guarded(bench, slots), guarded(bench, OutputRing.empty(capacity))
        self.expected = guarded(bench, slots), guarded(bench, OutputRing.empty(capacity))
        wide = bench.randint(0, 50, count + 1, pages + 1)
        wide[::5, 1] = -1
        self.settings = {
            "limits": bench.randint(6, 40, count),
            "ends": bench.integers([7, 3, 9]),
            # A part of a wider table, whose other pages are another slot's.
            "block_table": wide[:count, :pages],
            "page_size": PAGE,
            "num_depths": DEPTHS,
        }

    def advance(self, choices: torch.Tensor | None = None, waits: torch.Tensor | None = None) -> None:
        leaves = self.bench.randint(0, 3, self.count) == 0
        choices = self.bench.randint(0, 60, self.count) if choices is None else choices
        for implementation, (slots, ring) in (("triton", self.found), ("reference", self.expected)):
            advance_slots(
                slots, leaves, choices, waits=waits, **self.settings, ring=ring, implementation=implementation
            )
        for found, expected in zip(self.found, self.expected, strict=True):
            for name, held in vars(expected).items():
                assert torch.equal(getattr(found, name), held), name


def check_iterations(bench: Bench) -> None:
    """Many of them, until the ring has gone round and slots are finished."""
    for count, capacity in ((1, 1), (63, 64), (20, 21)):
        batch = Batch(bench, count, capacity=capacity)
        for _ in range(30):
            batch.advance()
        slots, ring = batch.expected
        assert ring.counts[1] == 30
        if count > 1:
            assert ring.counts[0] > capacity
            assert slots.finished.any()


def check_waiting(bench: Bench) -> None:
    """Some slots wait, wherever they are, and go on later."""
    batch = Batch(bench, 63, capacity=64)
    batch.advance()  # or some would begin without a page
    for _ in range(20):
        before = {name: held.clone() for name, held in vars(batch.expected[0]).items()}
        waits = bench.randint(0, 2, 63) == 0
        batch.advance(waits=waits)
        still = waits & before["active"]
        for name in ("active", "token", "depth", "position", "finished"):
            assert torch.equal(getattr(batch.expected[0], name)[still], before[name][still]), name


def check_endings(bench: Bench) -> None:
    """Every one of them."""
    for end in (7, 3, 9):
        batch = Batch(bench, 24, capacity=24)
        for _ in range(DEPTHS):
            batch.advance(torch.full((24,), end, dtype=torch.int32, device=bench.device))
        assert batch.expected[0].finished.any()


def check_pages_run_out(bench: Bench) -> None:
    """Slots pause where their table ends, or has no page."""
    for _ in range(3):
        batch = Batch(bench, 24, capacity=24, pages=2)
        for _ in range(10):
            batch.advance()
        slots = batch.expected[0]
        assert (~slots.active & ~slots.finished).any()
