"""The arithmetic between positions, stored layers and depths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recursify.modeling import LayerLayout, LayerRef, LayoutError


def test_cycle_repeats_the_block():
    """A cycle of 6 layers in 2 recursions runs 0 1 2 0 1 2."""
    assert LayerLayout.fold(6, 2, "cycle").layer_to_block() == [0, 1, 2, 0, 1, 2]


def test_sequence_repeats_each_layer():
    """A sequence runs 0 0 1 1 2 2."""
    assert LayerLayout.fold(6, 2, "sequence").layer_to_block() == [0, 0, 1, 1, 2, 2]


def test_middle_cycle_keeps_first_and_last():
    """MoR's table 1: 32 layers in 3 recursions are 1 + 10 x 3 + 1, of which 12 are stored."""
    layout = LayerLayout.fold(32, 3, "middle_cycle")
    assert (layout.num_prelude_layers, layout.block_size, layout.num_coda_layers) == (1, 10, 1)
    assert layout.num_unique_layers == 12
    assert layout.layer_to_block() == [0, *list(range(1, 11)) * 3, 11]


def test_middle_sequence_keeps_first_and_last():
    """MoR's table 1: inner layers are repeated in place."""
    assert LayerLayout.fold(8, 2, "middle_sequence").layer_to_block() == [0, 1, 1, 2, 2, 3, 3, 4]


def test_explicit_prelude_and_coda():
    """SmolLM2's 30 layers as 4 + 11 x 2 + 4."""
    layout = LayerLayout.fold(30, 2, "cycle", num_prelude_layers=4, num_coda_layers=4)
    assert layout.block_size == 11
    assert layout.layer_ref(3) == LayerRef("prelude", 3, 0)
    assert layout.layer_ref(4) == LayerRef("block", 0, 0)
    assert layout.layer_ref(15) == LayerRef("block", 0, 1)
    assert layout.layer_ref(29) == LayerRef("coda", 3, 0)
    assert layout.positions(10) == [14, 25]


@given(
    prelude=st.integers(0, 5),
    coda=st.integers(0, 5),
    block=st.integers(1, 6),
    recursions=st.integers(1, 5),
    order=st.sampled_from(["cycle", "sequence"]),
)
def test_slot_and_position_are_inverse(prelude, coda, block, recursions, order):
    """Every position has one slot, and every slot of the block one position."""
    layout = LayerLayout(
        num_prelude_layers=prelude, block_size=block, num_recursions=recursions, num_coda_layers=coda, order=order
    )
    slots = list(layout.layer_refs())
    assert len(slots) == len(set(slots)) == layout.num_layers
    for position, slot in enumerate(slots):
        if slot.part == "block":
            assert layout.position(slot.index, slot.depth) == position
    assert len(set(layout.layer_to_block())) == layout.num_unique_layers


def test_indivisible_depth_lists_what_fits():
    """30 layers do not make 4 recursions; the message names folds that work, and they do."""
    with pytest.raises(LayoutError, match=r"30 - prelude 0 - coda 0 = 30, which is not divisible by 4.*--recursions 3"):
        LayerLayout.fold(30, 4, "cycle")
    with pytest.raises(LayoutError, match=r"--prelude 1 --coda 1"):
        LayerLayout.fold(30, 4, "cycle")
    assert LayerLayout.fold(30, 4, "cycle", num_prelude_layers=1, num_coda_layers=1).block_size == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 0, "cycle"), "num_recursions must be at least 1, got 0"),
        ((6, 2, "spiral"), "Unknown sharing 'spiral'. Use one of: cycle, sequence"),
    ],
)
def test_wrong_folds_are_refused(arguments, message):
    """Recursions below one and unknown schemes."""
    with pytest.raises(LayoutError, match=message):
        LayerLayout.fold(*arguments)


def test_ends_that_leave_nothing_are_refused():
    """A prelude and coda as long as the model."""
    with pytest.raises(LayoutError, match=r"6 layers less a prelude of 3 and a coda of 3 leave 0"):
        LayerLayout.fold(6, 2, "cycle", num_prelude_layers=3, num_coda_layers=3)


@pytest.mark.parametrize(
    ("order", "block"), [("cycle", [1, 2, 1, 2, 3, 4]), ("sequence", [1, 1, 2, 3, 3, 4])], ids=["cycle", "sequence"]
)
def test_sources_of_another_number_of_recursions(order, block):
    """Prelude and coda keep their order; the block's layers come from the depths that they stand for."""
    layout = LayerLayout(num_prelude_layers=1, block_size=2, num_recursions=2, num_coda_layers=2, order=order)
    assert layout.sources([0, 0, 1]) == [0, *block, 5, 6]
    assert layout.sources([0, 1]) == list(range(7))
