"""``inspect_model``: facts from the headers."""

from __future__ import annotations

import json

import pytest

from helpers.tiny_models import convert_tiny
from recursify.checkpoint.description import inspect_model
from recursify.convert.export import export_model
from recursify.errors import CheckpointError


def test_facts_of_a_model(tiny_llama, tmp_path):
    """Parameters are the model's own, the effective ones those of its export; the dictionary is JSON-ready."""
    model = convert_tiny(tiny_llama, tmp_path / "recursive", lora_rank=4)
    for folder in (tmp_path / "recursive", str(tmp_path / "recursive")):
        facts = inspect_model(folder)
        assert facts.parameters.stored == model.num_parameters()
        assert facts.layout == model.config.layout
        assert (facts.lora_rank, facts.dtype, facts.exits, facts.routing) == (4, "float32", None, None)
    assert 4 * facts.parameters.effective == export_model(tmp_path / "recursive", tmp_path / "dense").num_bytes
    assert json.loads(json.dumps(facts.to_dict()))["layout"]["layer_to_block"] == facts.layout.layer_to_block()
    assert facts.layout_text().splitlines()[0] == "prelude   layers 0-0, once"


def test_exits_and_routers(tiny_llama, tmp_path):
    """Counted apart from the dense model's parameters."""
    model = convert_tiny(tiny_llama, tmp_path / "recursive", lora_rank=4)
    effective = inspect_model(tmp_path / "recursive").parameters.effective
    model.add_exit_heads("norm")
    model.save_pretrained(tmp_path / "exits")
    facts = inspect_model(tmp_path / "exits")
    assert (facts.exits.head, facts.exits.depths) == ("norm", [0])
    assert facts.parameters.exits > 0
    assert facts.parameters.effective == effective
    model = convert_tiny(tiny_llama, tmp_path / "recursive", lora_rank=4)
    model.add_routers("expert_choice")
    model.save_pretrained(tmp_path / "routed")
    facts = inspect_model(tmp_path / "routed")
    assert facts.routing.router == "expert_choice"
    assert facts.parameters.routers > 0
    assert facts.parameters.effective == effective


def test_what_cannot_be_described(tiny_llama, tmp_path):
    """A dense model, and a damaged config."""
    with pytest.raises(CheckpointError, match="is not a recursive model"):
        inspect_model(tiny_llama)
    (tmp_path / "config.json").write_text('{"model_type": "recursive", "num_recursions": 5}')
    with pytest.raises(CheckpointError, match="has a config that does not load: Cannot fold"):
        inspect_model(tmp_path)
