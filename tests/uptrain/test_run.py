"""The function ``uptrain_model``: its arguments, and what is refused before a run."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from helpers.runs import BASE, weights
from helpers.tiny_models import save_tiny
from recursify.errors import CheckpointError, RecursifyError, SettingsError
from recursify.uptrain.exits import Exits
from recursify.uptrain.run import STAGES, check_settings, uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("uptraining")


def test_options_are_fields_of_the_settings(source, plain, tmp_path):
    """Paths as strings, fields as keywords, and progress by step: the run of the same settings object."""
    reports = []
    options = {**BASE.to_dict(), "data": None}
    result = uptrain_model(
        str(source), str(tmp_path / "out"), progress=lambda *report: reports.append(report), **options
    )
    assert reports[-1] == ("uptrain, tokens", 6 * 4 * 32, 6 * 4 * 32)
    assert replace(result, output=plain[1].output, curves=plain[1].curves) == plain[1]
    assert result.to_dict()["output"] == str(tmp_path / "out")


def test_wrong_arguments(source, tmp_path):
    """One clear error each, and nothing is written."""
    with pytest.raises(SettingsError, match=r"Unknown setting 'max_token'\. Did you mean 'max_tokens'"):
        uptrain_model(source, tmp_path / "out", max_token=1)
    with pytest.raises(SettingsError, match="Got settings and also max_tokens"):
        uptrain_model(source, tmp_path / "out", settings=BASE, max_tokens=1)
    with pytest.raises(SettingsError, match="Give one of them"):
        uptrain_model(source, tmp_path / "out", resume=True, overwrite=True)
    with pytest.raises(CheckpointError, match="There is no model folder at 'nowhere'"):
        uptrain_model("nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a recursive model"):
        uptrain_model(source.parent / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_of_another_name_trains_its_parts(source, tmp_path, monkeypatch):
    """Exit heads are trained by every stage derived from ``exits``."""
    monkeypatch.setitem(STAGES, "more_exits", type("MoreExits", (Exits,), {}))
    settings = replace(BASE, stage="more_exits", exit_head="norm", trainable="heads", max_tokens=2 * 4 * 32)
    uptrain_model(source, tmp_path / "out", settings=settings)
    heads = {name: weight for name, weight in weights(tmp_path / "out").items() if "exit_heads" in name}
    norm = weights(source)["model.norm.weight"]
    assert any(name.endswith("norm.weight") and not torch.equal(weight, norm) for name, weight in heads.items())


def test_settings_of_stages_and_optimizers():
    """Combinations are checked by the stage and the optimizer, before anything is loaded."""
    for options, message in (
        ({"ce_weight": 0, "kl_weight": 0}, "both 0, so there is nothing to learn"),
        ({"trainable": "heads"}, "Stage 'heal' does not train heads"),
        ({"trainable": "routers"}, "Stage 'heal' does not train routers"),
        ({"stage": "exits", "trainable": "routers"}, "Stage 'exits' does not train routers"),
        ({"optimizer": "adafactor", "sharding": "fsdp2"}, "optimizer 'adafactor' factorizes whole matrices, and"),
        ({"stage": "exit"}, "Unknown stage 'exit'. Use one of: heal, exits, routers, layers, tie"),
    ):
        with pytest.raises(SettingsError, match=message):
            check_settings(UptrainSettings(**options))
    assert check_settings(UptrainSettings(stage="exits", ce_weight=0, kl_weight=0, trainable="heads")) is Exits


def test_wrong_teachers_and_lengths(source, tmp_path):
    """Another vocabulary, none to be found, and sequences beyond the context."""
    save_tiny(tmp_path / "other", vocab_size=300)
    with pytest.raises(CheckpointError, match="has 300 tokens, that of the model 260"):
        uptrain_model(source, tmp_path / "a", settings=replace(BASE, teacher=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match=r"The teacher does not open.*--kl-weight 0"):
        uptrain_model(source, tmp_path / "b", settings=replace(BASE, teacher="nowhere"))
    with pytest.raises(SettingsError, match="length 512 is longer than the model's context of 256"):
        uptrain_model(source, tmp_path / "c", settings=replace(BASE, length=512))


def test_a_refused_run_leaves_the_output_as_it_was(source, plain, tmp_path):
    """``overwrite`` replaces a model once nothing is left to be refused, not before."""
    output = tmp_path / "out"
    shutil.copytree(plain[0], output)
    before = weights(output)
    for wrong in (
        {"data": ("nowhere.txt",)},
        {"teacher": "nowhere"},
        {"length": 512},
        {"stage": "exits", "exit_head": "x"},
    ):
        with pytest.raises(RecursifyError):
            uptrain_model(source, output, settings=replace(BASE, **wrong), overwrite=True)
    layers = replace(BASE, stage="layers", data=("nowhere.txt",))
    with pytest.raises(RecursifyError):
        uptrain_model(source, output, settings=layers, overwrite=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(output).items())
