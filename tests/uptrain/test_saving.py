"""Commands that save a model whose generation config transformers refuses to write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from helpers.runs import BASE, make_source
from helpers.tiny_models import random_ids, tiny_recursive
from recursify.checkpoint.loading import load_model
from recursify.convert.export import export_model
from recursify.errors import CheckpointError
from recursify.hub.push import _save_for_push
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.run import uptrain_model

FILE = "generation_config.json"
GIVEN = {"temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0, "eos_token_id": [5, 7], "repetition_penalty": 1.1}
"""Sampling without ``do_sample``, and a penalty of beams without beams, beside fields that have an effect."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A recursive folder made from a dense one that has the file."""
    folder = make_source(tmp_path_factory.mktemp("models"))
    for each in (folder, folder.parent / "dense"):
        (each / FILE).write_text(json.dumps(GIVEN), encoding="utf-8")
    return folder


def written(folder) -> dict:
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


def assert_mended(folder):
    """Only what ``generate`` ignores is missing."""
    fields = written(folder)
    assert {name: fields.get(name) for name in GIVEN} == {
        **GIVEN,
        **dict.fromkeys(("temperature", "top_p", "length_penalty")),
    }


@pytest.mark.parametrize("stage", ["heal", "exits", "layers"])
def test_uptraining(source, tmp_path, stage):
    """Checkpoints are written, and the finished model has the file of the model that was trained."""
    settings = replace(BASE, max_tokens=3 * 4 * 32, save_every=1, eval_every=3)

    uptrain_model(source, tmp_path / "out", settings=replace(settings, stage=stage))
    assert written(tmp_path / "out") == GIVEN


def test_other_commands_and_calls(source, tmp_path, caplog):
    """Export, upload, ``save_pretrained`` of a model as loaded, and by recursify."""
    export_model(source, tmp_path / "dense")
    assert written(tmp_path / "dense")["repetition_penalty"] == 1.1
    model = RecursiveForCausalLM.from_pretrained(source)
    _save_for_push(model, tmp_path / "pushed", "1GB")
    own = load_model(source)[0]
    own.save_pretrained(tmp_path / "own")
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "changed")
    assert model.generation_config.temperature == 0.6, "in memory nothing is lost"
    for name in ("pushed", "own", "changed"):
        assert_mended(tmp_path / name)
    warnings = [record.message for record in caplog.records if "saved without temperature=0.6" in record.message]
    assert len(warnings) <= 1, "once in a process"
    ids = random_ids(1, 5)
    with torch.no_grad():
        again = RecursiveForCausalLM.from_pretrained(tmp_path / "own")
        assert torch.equal(again.generate(ids, max_new_tokens=6), own.generate(ids, max_new_tokens=6))


def test_the_warning_names_what_is_left_out(tmp_path, caplog):
    model = tiny_recursive()
    model.generation_config = GenerationConfig(temperature=0.123, output_scores=True)
    model.save_pretrained(tmp_path)
    assert "saved without temperature=0.123, output_scores=True of its generation config" in caplog.text
    assert "temperature" not in written(tmp_path)
    sampled = GenerationConfig(temperature=0.123, do_sample=True)
    model.generation_config = sampled
    model.save_pretrained(tmp_path / "sampled")
    assert written(tmp_path / "sampled")["temperature"] == 0.123


@pytest.mark.parametrize("part", ["generation config", "tokenizer"])
def test_what_cannot_be_saved_is_refused_before_the_first_step(source, tmp_path, monkeypatch, part):
    """And nothing is in the output folder."""
    if part == "tokenizer":
        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", _broken)
        match = "The tokenizer of .* loads and cannot be saved, so training would be lost: cannot be written"
    else:
        monkeypatch.setattr("recursify.uptrain.saving.savable", _broken)
        match = "The generation_config.json of .* loads and cannot be saved, so training would be lost"
    with pytest.raises(CheckpointError, match=match):
        uptrain_model(source, tmp_path / "out", settings=BASE)
    assert not (tmp_path / "out").exists()


def _broken(*_, **__):
    raise ValueError("cannot be written")
