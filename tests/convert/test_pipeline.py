"""``plan_conversion`` and ``convert_model``."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_models import random_ids, save_tiny
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.convert import pipeline
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.convert.settings import ConversionSettings
from recursify.errors import OutputError, PlanError, SettingsError
from recursify.evaluation.perplexity import compare
from recursify.modeling import RecursiveForCausalLM

TINY = {"lora_rank": 4, "calibration_data": ()}


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_conversion_of_strings_and_paths(tiny_llama, tmp_path, kind):
    """The plan is that of ``plan_conversion``; the result is typed, and JSON-ready."""
    stages, plans = [], []
    result = convert_model(
        kind(tiny_llama),
        kind(tmp_path / "out"),
        **TINY,
        on_plan=plans.append,
        progress=lambda *step: stages.append(step),
    )
    assert result.output == tmp_path / "out"
    assert plans == [result.plan]
    assert result.plan.to_dict() == plan_conversion(kind(tiny_llama), **TINY).to_dict()
    recorded = json.loads((tmp_path / "out" / "recursify.json").read_text())
    assert recorded["evaluation"][0]["perplexity"] == result.check.comparison.model.perplexity
    measured = ("evaluation", "fingerprint")
    assert {name: value for name, value in recorded.items() if name not in measured} == {
        name: value for name, value in json.loads(json.dumps(result.record)).items() if name not in measured
    }
    assert 0 <= result.check.comparison.top1_agreement <= 1
    assert json.loads(json.dumps(result.to_dict()))["check"]["text"] == result.check.text
    assert ("copy", 1, stages[0][2]) == stages[0]


def test_settings_or_keywords(tiny_llama, tmp_path):
    """Either gives the same plan; both at once, an unknown name and a wrong value are refused."""
    settings = ConversionSettings(**TINY)
    assert plan_conversion(tiny_llama, settings=settings).to_dict() == plan_conversion(tiny_llama, **TINY).to_dict()
    with pytest.raises(SettingsError, match="Got settings and also lora_rank"):
        plan_conversion(tiny_llama, settings=settings, lora_rank=8)
    with pytest.raises(SettingsError, match=r"lora_rnk.*lora_rank"):
        convert_model(tiny_llama, tmp_path / "out", lora_rnk=8)
    with pytest.raises(SettingsError, match="num_recursions"):
        convert_model(tiny_llama, tmp_path / "out", num_recursions=0)
    with pytest.raises(PlanError, match="Unknown initialization 'mean'"):
        convert_model(tiny_llama, tmp_path / "out", initialization="mean")
    assert not (tmp_path / "out").exists()


def test_an_existing_output(tiny_llama, tmp_path):
    """Only replaced when asked; without a check there are no figures."""
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        convert_model(tiny_llama, tmp_path / "out", **TINY)
    result = convert_model(tiny_llama, tmp_path / "out", **TINY, overwrite=True, check=False)
    assert result.check is None
    assert result.to_dict()["check"] == {}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_rank": 8, "lora_rank_pattern": {"mlp.down_proj": "full"}},
        {"lora_rank": "full", "rank_allocation": "tail"},
        {"initialization": "calibrated", "relaxation": "calibrated"},
    ],
)
def test_one_recursion_stores_no_residuals(tiny_llama, options):
    """Whatever the ranks: a tied group of one layer is stored as it is, and no text is read."""
    plan = plan_conversion(tiny_llama, num_recursions=1, **options)
    assert plan.recursive.num_parameters == plan.dense.num_parameters
    assert (plan.config.lora_rank, plan.config.lora_rank_pattern, plan.settings.lora_rank) == (0, {}, 0)
    assert not plan.needs_text
    assert "LoRA            none (one recursion)" in str(plan)


def test_one_recursion_is_the_dense_model(tiny_llama, tmp_path):
    """To the bit, by default settings."""
    convert_model(tiny_llama, tmp_path / "out", num_recursions=1, check=False)
    model, ids = RecursiveForCausalLM.from_pretrained(tmp_path / "out").eval(), random_ids(2, 9)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, open_checkpoint(tiny_llama).load_model()(ids).logits)
    with pytest.raises(PlanError, match="Unknown rank allocation 'even'"):
        plan_conversion(tiny_llama, num_recursions=1, rank_allocation="even")


def test_check_of_float16(tmp_path):
    """The figures of the float16 weights of both models, computed in float32."""
    save_tiny(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    dense.save_pretrained(tmp_path / "dense")
    result = convert_model(tmp_path / "dense", tmp_path / "out", **TINY)
    assert result.plan.config.dtype == torch.float16
    dense.float().save_pretrained(tmp_path / "dense")
    figures = result.check.comparison
    control = open_checkpoint(tmp_path / "dense").load_model()
    windows = pipeline._read_check_text(open_checkpoint(tmp_path / "dense")).windows
    model = RecursiveForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = compare(model, control, windows)
    assert figures.model.loss == pytest.approx(expected.model.loss, rel=1e-6)
    assert figures.control.loss == pytest.approx(expected.control.loss, rel=1e-6)
    assert figures.kl == pytest.approx(expected.kl, rel=1e-4)
