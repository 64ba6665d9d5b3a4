"""Choice of a layout for a budget: what it must find in models made for it, and what it promises of sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers.command_line import run
from helpers.tiny_models import byte_tokenizer, save_tiny, tiny_dense
from recursify import plan_layouts
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.convert.calibration import SHARE_TOKENS
from recursify.convert.layout_plan import search_layouts
from recursify.convert.layout_search import LayoutSearch, candidate_layouts
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.convert.settings import ConversionSettings
from recursify.convert.sharing import share
from recursify.convert.weighted_norm import TiedNorms, WeightedNorm
from recursify.errors import PlanError, SettingsError
from recursify.evaluation.text import default_text
from recursify.progress import silent

TEXT = {"calibration_tokens": 512, "calibration_length": 64}


def search(folder, **settings) -> LayoutSearch:
    chosen = ConversionSettings(**{**TEXT, **settings})
    return search_layouts(open_checkpoint(folder), chosen, default_text("calibration"), silent)


@pytest.fixture(scope="module")
def searched(tiny_llama):
    return search(tiny_llama)


def save_tied(folder, order: list[int]) -> None:
    """Write a tiny Llama whose layer at each position is a copy of the layer at ``order[position]``."""
    dense = tiny_dense("llama")
    for position, source in enumerate(order):
        dense.model.layers[position].load_state_dict(dense.model.layers[source].state_dict())
    dense.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("order", "layout", "kind"),
    [
        ([0, 1, 2, 0, 1, 2], "0 + (3 layers × 2) + 0", "cycle"),
        ([0, 0, 2, 2, 4, 4], "0 + (3 layers, each × 2) + 0", "sequence"),
        ([0, 1, 1, 1, 4, 5], "1 + (1 layers × 3) + 2", "cycle"),
    ],
)
def test_layers_that_are_equal_are_tied(tmp_path, order, layout, kind):
    """Tying copies costs nothing, so the smallest layout that ties them and nothing else has the dense perplexity."""
    save_tied(tmp_path, order)
    found = search(tmp_path)
    stored = len(set(order))
    smallest = found.num_parameters - (6 - stored) * sum(rows * columns for rows, columns in found.shapes.values())
    lora = 8 * sum(map(sum, found.shapes.values())) * (2 * stored if stored == 3 else 3)
    choice = found.choose(smallest + lora)
    assert (str(choice.layout), choice.layout.order) == (layout, kind)
    assert choice.perplexity == pytest.approx(found.errors.measurement.perplexity, rel=1e-3)


def test_costs_are_those_of_the_shared_weights(searched):
    """The cost of a group is the error of the weight that conversion would share."""
    group, measurement = (1, 4), searched.errors.measurement
    samples = [measurement.layers[position] for position in group]
    for stage in measurement.stages:
        norms = TiedNorms(WeightedNorm(sample.moments[stage[0]], SHARE_TOKENS) for sample in samples)
        for path in stage:
            weights = [sample.rows[path] for sample in samples]
            shared = share(weights, norms).float()
            expected = 0.0
            for sample, weight in zip(samples, weights, strict=True):
                errors = sample.inputs[stage[0]].float() @ (weight - shared).mT
                expected += float(errors.square().mean(1) @ sample.costs[path])
            assert searched.errors.cost(group)[path] == pytest.approx(expected, rel=1e-2)


def test_ranks_remove_the_cost(searched):
    """A residual removes more with every rank, and all of it once two residuals have all ranks of the difference."""
    for path, (rows, columns) in searched.shapes.items():
        ranks = torch.arange(min(rows, columns) + 1)
        left = searched.errors.remaining((1, 4), path, ranks)
        assert left[0] == pytest.approx(1)
        assert (left.diff() <= 0).all()
        assert left[math.ceil(min(rows, columns) / 2)] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [0.95, 0.9, 0.87])
def test_size_is_that_of_the_plan(tiny_llama, searched, size):
    """The parameters predicted are those of the model that conversion writes, and within the budget."""
    choice = searched.choose(int(size * searched.num_parameters))
    plan = plan_conversion(tiny_llama, **choice.settings())
    assert choice.num_parameters == plan.recursive.num_parameters <= size * plan.dense.num_parameters
    assert searched.num_parameters == plan.dense.num_parameters


def test_smaller_budgets_cost_more(searched):
    front = searched.front((0.95, 0.9, 0.85, 0.8))
    assert [c.perplexity for c in front] == sorted(c.perplexity for c in front)
    assert [c.size for c in front] == sorted((c.size for c in front), reverse=True)


def test_ranks_bought_beat_uniform_ranks(searched):
    uniform = searched.score(next(candidate_layouts(6)), 8)
    assert searched.choose(uniform.num_parameters).score <= uniform.score


def test_every_family_is_measured(family, tmp_path):
    save_tiny(tmp_path, family)
    found = search(tmp_path)
    for group in ((0, 1), (0, 3), (1, 2, 3)):
        costs = found.errors.cost(group)
        assert all(0 < cost < math.inf for cost in costs.values()), costs


def test_inputs_wider_than_the_text(tmp_path):
    """More features than tokens: errors on tokens that the shared weight was not fitted to."""
    save_tied(tmp_path, [0, 1, 2, 0, 4, 5])
    found = search(tmp_path, calibration_tokens=64, calibration_length=32)
    narrow = search(tmp_path, calibration_tokens=24, calibration_length=12)
    assert "mlp.down_proj" in found.errors.measurement.layers[0].moments
    assert not narrow.errors.measurement.layers[0].moments
    for each in (found, narrow):
        tied, others = each.errors.cost((0, 3)), each.errors.cost((1, 4))
        assert all(tied[path] < 1e-3 * others[path] for path in tied)


def test_budget_that_no_layout_meets(tiny_llama, searched):
    with pytest.raises(PlanError, match=r"at most 1,000 parameters.*The nearest is .* with rank 8: [\d,]+ \(0\.\d+\)"):
        searched.choose(1000)
    with pytest.raises(PlanError, match="--target-size 0"):
        plan_conversion(tiny_llama, target_size=0.05, **TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_size": 0.9, "target_parameters": 10**6}, "two budgets"),
        ({"target_size": 0.9, "num_prelude_layers": 1}, "Leave out num_prelude_layers"),
        ({"target_size": 1.5}, "below 1"),
        ({"target_parameters": 0}, "target_parameters"),
    ],
)
def test_budgets_that_make_no_sense(settings, message):
    with pytest.raises(SettingsError, match=message):
        ConversionSettings(**settings)


def test_budget_without_text(tiny_llama):
    with pytest.raises(PlanError, match="needs a tokenizer and text"):
        plan_conversion(tiny_llama, target_size=0.9, calibration_data="none")


def test_convert_to_a_size(tiny_llama, tmp_path):
    result = convert_model(tiny_llama, tmp_path / "small", target_size=0.9, check=False, **TEXT)
    assert result.plan.recursive.num_parameters <= 0.9 * result.plan.dense.num_parameters
    assert result.record["plan"]["lora_rank_pattern"]


def test_layers_that_do_not_fold_by_default(tmp_path):
    """Seven layers: the default layout does not exist, and the table does."""
    save_tiny(tmp_path, num_hidden_layers=7)
    plan = plan_layouts(tmp_path, target_size=0.9, **TEXT)
    assert plan.default is None
    assert plan.chosen.size <= 0.9


def test_plan_command(tiny_llama, tmp_path, capsys):
    options = ["--calibration-tokens", "512", "--calibration-length", "64", "--target-size", "0.9"]
    assert run("plan", tiny_llama, *options, "--json", "--plot", tmp_path / "sizes.svg") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["front"][0]["size"] > data["front"][-1]["size"]
    assert data["chosen"]["size"] <= 0.9
    assert "predicted perplexity" in (tmp_path / "sizes.svg").read_text()
    assert run("plan", tiny_llama, *options) == 0
    out = capsys.readouterr().out
    assert out.count("Pareto") == len(data["front"])
    assert f"--target-parameters {data['chosen']['num_parameters']}" in out
