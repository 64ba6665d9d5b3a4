"""Fields of the configuration given to ``from_pretrained``: for one run, never written, and never another model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from helpers.small_engine import recursive
from helpers.tiny_models import random_ids
from recursify.modeling import RecursiveForCausalLM
from recursify.modeling.configuration_recursive import _own_fields
from recursify.modeling.recursive_overrides import OVERRIDABLE

IDS = random_ids(1, 9)

GIVEN = {
    "exit_depth": 0,
    "exit_kv": "copied",
    "exit_policy": "entropy",
    "exit_thresholds": [0.9],
    "exit_through_coda": False,
    "exit_vocabulary": 10,
    "residual_scale": 0.5,
    "router_thresholds": [0.1, 0.2],
}

OTHER = {
    "dense_model_type": "mistral",
    "num_recursions": 4,
    "num_prelude_layers": 0,
    "num_coda_layers": 0,
    "num_hidden_layers": 4,
    "sharing": "sequence",
    "lora_rank": 2,
    "lora_rank_pattern": {"q_proj": 1},
    "tie_norms": True,
    "exit_head": "low_rank",
    "exit_rank": 3,
    "depth_map": [0, 0],
    "anderson": 1,
    "router": "token_choice",
    "router_width": "mlp",
    "router_activation": "softmax",
    "router_temperature": 2.0,
    "router_alpha": 0.5,
    "router_gate": "mor",
    "router_capacities": [1.0, 0.5],
    "router_kv": "shared",
    "router_decision": "auxiliary",
    "format_version": 7,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "own"
    recursive(exit_head="shared", exit_policy="confidence", exit_thresholds=[0.5]).save_pretrained(path)
    return path


def config_of(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def test_every_field_is_one_or_the_other():
    assert set(GIVEN) == set(OVERRIDABLE)
    assert set(GIVEN) | set(OTHER) == {*_own_fields(), "num_hidden_layers"}


@pytest.mark.parametrize("name", GIVEN)
def test_what_was_given_is_not_written(folder, tmp_path, name):
    """The saved folder is the one that was loaded; a value that is set afterwards is written."""
    model = RecursiveForCausalLM.from_pretrained(folder, **{name: GIVEN[name]})
    assert getattr(model.config, name) == GIVEN[name]
    model.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(folder)
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in folder.iterdir()}
    assert getattr(model.config, name) == GIVEN[name], "saving changes nothing in memory"
    model.config.change(**{name: GIVEN[name]})
    model.save_pretrained(tmp_path / "chosen")
    assert config_of(tmp_path / "chosen")[name] == GIVEN[name]


def test_values_that_are_set_later(folder, tmp_path):
    """They are written, by assignment too; and a config that is loaded first passes what it was given on."""
    config = AutoConfig.from_pretrained(folder, exit_depth=0)
    model = RecursiveForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        full = RecursiveForCausalLM.from_pretrained(folder)(IDS).logits
        assert not torch.allclose(model(IDS).logits, full, atol=1e-2)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(RecursiveForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, full)
    model.config.exit_thresholds = [0.7]
    model.save_pretrained(tmp_path / "changed")
    assert config_of(tmp_path / "changed")["exit_thresholds"] == [0.7]
    assert config_of(tmp_path / "changed")["exit_depth"] is None


@pytest.mark.parametrize("name", OTHER)
def test_another_model_is_refused(folder, name):
    """transformers would load the weights, and compute something else with them."""
    with pytest.raises(ValueError, match=rf"{name}=.* cannot be given to from_pretrained: .* made for"):
        RecursiveForCausalLM.from_pretrained(folder, **{name: OTHER[name]})


def test_wrong_values_are_refused(folder):
    with pytest.raises(ValueError, match=r"config\.exit_depth is 'last', which is not int"):
        RecursiveForCausalLM.from_pretrained(folder, exit_depth="last")
    with pytest.raises(ValueError, match="exit_thresholds has 2 values, and the model 1 exits"):
        RecursiveForCausalLM.from_pretrained(folder, exit_thresholds=[0.5, 0.5])
