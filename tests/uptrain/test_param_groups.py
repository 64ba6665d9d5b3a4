"""Balanced residuals: the same function, factors of one size."""

from __future__ import annotations

import torch

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from helpers.tolerances import LOGITS
from recursify.modeling import RelaxedLinear
from recursify.uptrain.param_groups import balance_factors


def residuals(model):
    """All relaxed linear maps."""
    return [module for module in model.modules() if isinstance(module, RelaxedLinear)]


def test_balancing_changes_no_output(tmp_path):
    """Both factors of each component get one norm; logits move by rounding."""
    save_tiny(tmp_path / "dense")
    model = convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank=4)
    ids = random_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        balance_factors(model)
        torch.testing.assert_close(model(ids).logits, before, atol=LOGITS[torch.float32], rtol=0)
    for module in residuals(model):
        torch.testing.assert_close(module.lora_a.norm(dim=2), module.lora_b.norm(dim=1))


def test_residuals_at_zero_and_frozen_ones_stay(tmp_path):
    """``A`` of a zero-initialized LoRA is not scaled to nothing, and what is not trained is not touched."""
    save_tiny(tmp_path / "dense")
    model = convert_tiny(tmp_path / "dense", tmp_path / "recursive", lora_rank=4, relaxation="zero")
    frozen = residuals(model)[0]
    with torch.no_grad():
        frozen.lora_b.fill_(3.0)
    frozen.lora_a.requires_grad_(False)
    before = [(module.lora_a.clone(), module.lora_b.clone()) for module in residuals(model)]
    balance_factors(model)
    for module, (a, b) in zip(residuals(model), before, strict=True):
        assert torch.equal(module.lora_a, a)
        assert torch.equal(module.lora_b, b)
