"""The fingerprint of a model's predictions: in float32 whatever the model's dtype, without a copy of the model."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.tiny_models import tiny_recursive
from recursify.evaluation.fingerprint import largest_difference, take_fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fingerprint_in_float32(family, dtype):
    """That of the model cast as a whole, to the bit; the model is as it was."""
    model = tiny_recursive(family, varied=True).to(dtype)
    before = copy.deepcopy(model.state_dict())
    assert take_fingerprint(model) == take_fingerprint(copy.deepcopy(model).float())
    after = model.state_dict()
    assert all(weight.dtype == dtype and torch.equal(weight, before[name]) for name, weight in after.items())


def test_one_module_at_a_time_is_in_float32():
    """Memory: the parameters in float32, seen from inside each linear map, are those of that map."""
    model, seen = tiny_recursive(varied=True).to(torch.bfloat16), []

    def record(module, *_):
        cast = {id(parameter) for parameter in model.parameters() if parameter.dtype == torch.float32}
        seen.append(cast <= {id(parameter) for parameter in module.parameters()})

    for owner in (model.model.block[0].mlp.down_proj, model.lm_head):
        owner.register_forward_hook(record)
    take_fingerprint(model)
    assert seen == [True] * len(seen)
    assert len(seen) == 3  # the block's map at two depths
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_difference_of_fingerprints():
    """Of the same weights none; of other weights some; of NaN infinite."""
    model = tiny_recursive(varied=True)
    recorded = take_fingerprint(model)
    assert largest_difference(recorded, recorded["log_probabilities"]) == 0
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    assert largest_difference(recorded, take_fingerprint(model)["log_probabilities"]) > 1e-3
    assert largest_difference(recorded, [float("nan")] * 32) == float("inf")
