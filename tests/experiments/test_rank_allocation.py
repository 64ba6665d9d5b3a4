"""Rank allocations: they keep the budget of uniform ranks, and buy the best gains."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_models import convert_tiny, save_tiny
from recursify.convert.pipeline import plan_conversion
from recursify.errors import RecursifyError
from recursify.experiments.rank_allocation import spend


@pytest.mark.parametrize("allocation", ["tail", "fisher"])
def test_allocation_keeps_the_budget(tmp_path, allocation):
    """Ranks differ, and no more parameters are stored than uniform ranks would."""
    save_tiny(tmp_path / "dense")
    uniform = convert_tiny(tmp_path / "dense", tmp_path / "u", sharing="cycle", lora_rank=6)
    model = convert_tiny(
        tmp_path / "dense", tmp_path / "t", sharing="cycle", lora_rank=6, rank_allocation=allocation,
        initialization="auto", relaxation="auto",
        calibration_data=None, calibration_tokens=2048, calibration_length=64,
    )  # fmt: skip
    ranks = {
        module.rank for layer in model.model.block for _, module in layer.stored_modules() if hasattr(module, "rank")
    }
    assert len(ranks) > 1
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, uniform)]
    assert 0.97 * sizes[1] <= sizes[0] <= sizes[1]


def test_ranks_are_bought_in_order_of_gain():
    """By hand: two modules of equal cost, one with a flat tail, one with a steep one."""
    gains = {"flat": torch.tensor([5.0, 4.0, 4.0, 4.0]), "steep": torch.tensor([9.0, 1.0, 0.5, 0.1])}
    assert spend(gains, {"flat": 10, "steep": 10}, budget=50) == {"flat": 4, "steep": 1}
    assert spend(gains, {"flat": 10, "steep": 10}, budget=60) == {"flat": 4, "steep": 2}
    assert spend(gains, {"flat": 100, "steep": 1}, budget=104) == {"flat": 1, "steep": 4}


def test_unknown_names_are_refused(tiny_llama):
    """With the names of those that exist."""
    with pytest.raises(RecursifyError, match=r"[Uu]nknown rank allocation 'tails'.*uniform"):
        plan_conversion(tiny_llama, rank_allocation="tails")
