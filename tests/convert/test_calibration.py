"""Calibrated initialization on tiny models: what it must do, whatever the text."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.tiny_models import byte_tokenizer, convert_tiny, random_ids, save_tiny, tiny_config
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.checkpoint.layerwise import Layerwise
from recursify.convert.pipeline import plan_conversion
from recursify.errors import PlanError, TextError
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import LayerLayout, RecursiveConfig

SMALL = {
    "calibration_data": None,
    "calibration_tokens": 2048,
    "calibration_length": 64,
    "initialization": "auto",
    "relaxation": "auto",
}


def drift(model, dense, windows) -> float:
    """Mean squared difference of logits on text that calibration did not see."""
    with torch.inference_mode():
        return float((model(windows).logits - dense(windows).logits).square().mean())


@pytest.fixture(scope="module")
def held_out():
    return token_windows(byte_tokenizer(), default_text("held_out"), 64, max_tokens=512)


def test_layerwise_equals_the_model(family, tmp_path):
    """Layers loaded and run one by one give the dense model's hidden states, to the bit."""
    dense = save_tiny(tmp_path / "dense", family)
    config = RecursiveConfig.from_dense(dense.config, LayerLayout.fold(6, 2, "cycle"))
    ids = random_ids(3, 16)
    with torch.no_grad():
        layers = Layerwise(open_checkpoint(str(tmp_path / "dense")), config)
        hidden = layers.embed(ids)
        for position in range(5):
            layer = layers.load(position)
            hidden = [layers.run(layer, position, batch) for batch in hidden]
        assert torch.equal(torch.cat(hidden), dense(ids, output_hidden_states=True).hidden_states[5])


def test_stages_are_found(family, tmp_path):
    """Every linear map in one stage; the writers to the residual stream are known, sandwich norms excepted."""
    dense = save_tiny(tmp_path / "dense", family)
    config = RecursiveConfig.from_dense(dense.config, LayerLayout.fold(6, 2, "cycle"))
    layers = Layerwise(open_checkpoint(str(tmp_path / "dense")), config)
    linears = [n for n, m in dense.base_model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(path for stage in layers.stages for path in stage) == sorted(linears)
    sandwiched = family in ("gemma2", "gemma3_text", "olmo2")
    assert layers.writes == ([False] * 4 if sandwiched else [False, True, False, True])


def test_windows_of_any_length_run(tmp_path):
    """One long window per batch, then a shorter one: masks and positions are those of its own length."""
    dense = save_tiny(tmp_path / "dense")
    config = RecursiveConfig.from_dense(dense.config, LayerLayout.fold(6, 2, "cycle"))
    layers = Layerwise(open_checkpoint(str(tmp_path / "dense")), config)
    for length in (23, 5):
        ids = random_ids(1, length)
        with torch.no_grad():
            (hidden,) = (layers.run(layers.load(0), 0, batch) for batch in layers.embed(ids))
            assert torch.equal(hidden, dense(ids, output_hidden_states=True).hidden_states[1])


@pytest.mark.parametrize(("recursions", "sharing"), [(2, "cycle"), (2, "middle_sequence"), (3, "cycle")])
def test_calibrated_beats_published(tmp_path, held_out, recursions, sharing):
    """On unseen text, and drift correction adds to it."""
    dense = save_tiny(tmp_path / "dense")
    layout = {"num_recursions": recursions, "sharing": sharing, "lora_rank": 6}
    published = drift(convert_tiny(tmp_path / "dense", tmp_path / "p", **layout), dense, held_out)
    plain = convert_tiny(tmp_path / "dense", tmp_path / "c", **{**SMALL, **layout, "drift_correction": False})
    corrected = convert_tiny(tmp_path / "dense", tmp_path / "d", **{**SMALL, **layout})
    assert drift(plain, dense, held_out) < published
    assert drift(corrected, dense, held_out) < drift(plain, dense, held_out)


def test_every_family_calibrates(family, tmp_path, held_out):
    """Fused, parallel, biased and sandwich-normed layers alike are nearer to the dense model than published ones."""
    dense = save_tiny(tmp_path / "dense", family)
    calibrated = convert_tiny(tmp_path / "dense", tmp_path / "c", **SMALL, lora_rank=6)
    published = convert_tiny(tmp_path / "dense", tmp_path / "p", lora_rank=6)
    assert drift(calibrated, dense, held_out) < drift(published, dense, held_out)


def test_full_rank_calibrated_equals_dense(tmp_path, held_out):
    """Nothing is left to fit, so nothing may change."""
    dense = save_tiny(tmp_path / "dense")
    model = convert_tiny(tmp_path / "dense", tmp_path / "out", **SMALL, lora_rank="full")
    assert drift(model, dense, held_out) ** 0.5 < 1e-3


def test_rank_zero_and_tied_norms_calibrate(tmp_path, held_out):
    """Sharing alone has a calibrated form, too."""
    dense = save_tiny(tmp_path / "dense")
    calibrated = convert_tiny(tmp_path / "dense", tmp_path / "c", **SMALL, lora_rank=0, tie_norms=True)
    published = convert_tiny(tmp_path / "dense", tmp_path / "p", lora_rank=0, tie_norms=True)
    assert drift(calibrated, dense, held_out) < drift(published, dense, held_out)


@pytest.mark.parametrize("combination", [("calibrated", "svd"), ("average", "calibrated"), ("stepwise", "calibrated")])
def test_strategies_mix(tmp_path, combination):
    """Either half can be the papers'."""
    save_tiny(tmp_path / "dense")
    initialization, relaxation = combination
    settings = {**SMALL, "initialization": initialization, "relaxation": relaxation, "lora_rank": 4}
    model = convert_tiny(tmp_path / "dense", tmp_path / "out", **settings)
    with torch.inference_mode():
        assert model(random_ids(1, 8)).logits.isfinite().all()


def test_a_random_start_is_random_with_calibrated_residuals(tmp_path):
    """The seed decides the shared weights, and the residuals are fitted to them."""
    save_tiny(tmp_path / "dense")
    settings = {**SMALL, "initialization": "random", "relaxation": "calibrated", "lora_rank": 4}
    models = [convert_tiny(tmp_path / "dense", tmp_path / f"out{seed}", **settings, seed=seed) for seed in (0, 1)]
    first, second = (model.model.block[0].mlp.up_proj.linear.weight for model in models)
    assert not torch.allclose(first, second, atol=1e-2)


def test_fisher(tmp_path):
    """Curvature from the dense model's gradients weighs the merge: between the layers it merges, and not their mean."""
    dense = save_tiny(tmp_path / "dense")
    settings = {**SMALL, "initialization": "fisher", "relaxation": "svd", "lora_rank": 0, "sharing": "cycle"}
    weight = convert_tiny(tmp_path / "dense", tmp_path / "out", **settings).model.block[0].mlp.up_proj.linear.weight
    ends = [dense.model.layers[p].mlp.up_proj.weight for p in (0, 3)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    assert ((weight >= low - 1e-6) & (weight <= high + 1e-6)).all()
    assert (weight - (ends[0] + ends[1]) / 2).abs().max() > 1e-3


def test_the_same_text_gives_the_same_model(tmp_path):
    """Nothing random is left unseeded."""
    save_tiny(tmp_path / "dense")
    first = convert_tiny(tmp_path / "dense", tmp_path / "a", **SMALL, lora_rank=4)
    second = convert_tiny(tmp_path / "dense", tmp_path / "b", **SMALL, lora_rank=4)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_record_says_how_it_was_made(tmp_path):
    """Text, tokens, settings and versions, enough to make it again."""
    save_tiny(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "out", **SMALL, lora_rank=4)
    record = json.loads((tmp_path / "out" / "recursify.json").read_text())
    assert record["calibration"]["num_tokens"] == 2048
    assert "pydoc_data.topics" in record["calibration"]["text"]
    assert record["calibration"]["drift_correction"] is True
    assert record["settings"]["initialization"] == "calibrated"
    assert str(tmp_path) not in json.dumps(record["calibration"])


def test_text_too_short(tmp_path):
    """With how much there is and how much is needed."""
    save_tiny(tmp_path / "dense")
    (tmp_path / "short.txt").write_text("Too short.")
    settings = {**SMALL, "calibration_data": [str(tmp_path / "short.txt")]}
    with pytest.raises(TextError, match=r"short.txt is too short: 10 tokens, and 2 windows of 64 are needed"):
        convert_tiny(tmp_path / "dense", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_are_named(tmp_path):
    """The number of tokens is to blame, not the text."""
    save_tiny(tmp_path / "dense")
    message = r"64 tokens are fewer than 2 windows of 64\. Use at least 128 tokens, or shorter windows"
    with pytest.raises(TextError, match=message):
        convert_tiny(tmp_path / "dense", tmp_path / "out", **{**SMALL, "calibration_tokens": 64})
    assert not (tmp_path / "out").exists()


def test_calibration_without_text_is_refused(tmp_path):
    """Asked for by name, and no text allowed."""
    save_tiny(tmp_path / "dense")
    with pytest.raises(PlanError, match=r"need text to calibrate on\. Give --calibration-data"):
        plan_conversion(tmp_path / "dense", initialization="calibrated", calibration_data=[])


def test_auto_without_text_is_the_papers_best(tmp_path):
    """Average with residuals, stepwise without."""
    save_tiny(tmp_path / "dense")

    def chosen(**settings):
        plan = plan_conversion(tmp_path / "dense", calibration_data=[], **settings)
        return plan.settings.initialization, plan.settings.relaxation

    assert chosen(lora_rank=4) == ("average", "svd")
    assert chosen(lora_rank=0)[0] == "stepwise"


def test_a_model_without_tokenizer_is_converted_without_text(tmp_path):
    """``auto`` does not fail on it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "dense")
    plan = plan_conversion(tmp_path / "dense", lora_rank=4)
    assert plan.settings.initialization == "average"
