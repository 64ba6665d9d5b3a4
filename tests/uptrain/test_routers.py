"""Training routers: what each loss adds up to, what moves, and that inference comes to decide as training does."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.processes import run
from helpers.runs import BASE, assert_resumes, assert_same, make_source, packed_batch, weights
from helpers.tiny_models import convert_tiny, random_ids
from recursify.errors import SettingsError
from recursify.modeling import RecursiveForCausalLM, Routing
from recursify.modeling.recursive_routing import warmed_up
from recursify.uptrain.callbacks import read_metrics
from recursify.uptrain.data import IGNORED
from recursify.uptrain.routers import (
    RouterFigures,
    Routers,
    auxiliary_loss,
    balancing_loss,
    updated_bias,
    z_loss,
)
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("uptraining")

ROUTED = replace(BASE, stage="routers", kl_weight=0.0, router_learning_rate=2e-2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Prelude, two shared layers twice, coda."""
    return make_source(tmp_path_factory.mktemp("routers"), num_recursions=2)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """Sixty steps of expert choice."""
    output = tmp_path_factory.mktemp("runs") / "routed"
    settings = replace(ROUTED, max_tokens=60 * 4 * 32, eval_every=99, save_every=99, router_weight=0.1)
    return output, uptrain_model(source, output, settings=settings)


def routed_loss(source, settings):
    """The objective, the model, what its forward gave, and the loss with and without what routers add."""
    model = RecursiveForCausalLM.from_pretrained(source).train()
    objective = Routers(settings, None)
    objective.prepare(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for router in model.model.routers:
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    inputs = packed_batch()
    outputs = model.model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    total, sums = objective(model, outputs, inputs)
    keep = inputs["labels"][:, 1:] != IGNORED
    logits = model.compute_logits(outputs.last_hidden_state)[:, :-1][keep]
    plain = F.cross_entropy(logits, inputs["labels"][:, 1:][keep], reduction="sum")
    return objective, model, outputs.routing, (total, plain), sums


# --- Losses by hand ------------------------------------------------------------------------------------------------


def test_auxiliary_loss_by_hand():
    """``−log σ(2)``, ``−log(1 − σ(1))`` and ``−log σ(−3)`` over three candidates; the fourth token is none."""
    logits = torch.tensor([[2.0, 1.0, -3.0, 9.0]])
    selected = torch.tensor([[True, False, True, False]])
    candidates = torch.tensor([[True, True, True, False]])
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log1p(math.exp(3))) / 3
    assert float(auxiliary_loss(logits, selected, candidates)) == pytest.approx(wanted, rel=1e-6)


def test_balancing_loss_by_hand():
    """``f = (1.5, 0, 1.5)`` over four tokens where two choose 0 and two 2: ``Σ f P``; 1 where all is even."""
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7], [0.0, 0.3, 0.7]]])
    wanted = 1.5 * 0.3 + 0 * 0.25 + 1.5 * 0.45
    assert float(balancing_loss(scores, torch.tensor([[0, 0, 2, 2]]))) == pytest.approx(wanted, rel=1e-6)
    even = torch.full((2, 6, 3), 1 / 3)
    assert balancing_loss(even, torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)).tolist() == pytest.approx([1, 1])


def test_z_loss_by_hand():
    """``log(e + e²)²`` and ``log(2)²``, averaged; a single logit is its own logsumexp."""
    logits = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    wanted = (math.log(math.e + math.e**2) ** 2 + math.log(2) ** 2) / 2
    assert float(z_loss(logits)) == pytest.approx(wanted, rel=1e-6)
    assert float(z_loss(torch.tensor([[[3.0], [1.0]]]))) == pytest.approx(5)


def test_bias_moves_by_its_rate():
    """Down where too many chose, up where too few, not at all at the mean."""
    bias = updated_bias(torch.zeros(3), torch.tensor([9.0, 6.0, 3.0]), 0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0, 0.001])


@pytest.mark.parametrize("decision", ["own", "auxiliary"])
def test_expert_choice_loss_is_its_formula(source, decision):
    """Cross-entropy, plus 0.3 times the auxiliary loss of both depths, whose targets are the selected tokens."""
    settings = replace(ROUTED, router_weight=0.3, router_z_weight=0.01, router_decision=decision)
    _, _, routing, (total, plain), sums = routed_loss(source, settings)
    taught = routing.deciding if decision == "auxiliary" else routing.logits
    rows = sum(auxiliary_loss(*each) for each in zip(taught, routing.selected, routing.candidates, strict=True))
    assert [int(each.sum()) for each in routing.selected] == [22, 10]
    z = (routing.logits[0].square().mean(-1) + routing.logits[1].square().mean(-1)) / 2
    kept = torch.tensor([7, 10])
    wanted = plain + 0.3 * (rows * kept).sum() + 0.01 * (z * kept).sum()
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    assert float(sums["router_loss"].detach()) == pytest.approx(float((rows * kept).sum()), rel=1e-5)


def test_token_choice_loss_is_its_formula(source):
    """Cross-entropy plus 0.1 times the balancing loss; a bias instead adds nothing and counts the loads."""
    _, _, routing, (total, plain), _ = routed_loss(source, replace(ROUTED, router="token_choice"))
    rows = balancing_loss(routing.logits[0].softmax(-1), routing.depths)
    torch.testing.assert_close(total, plain + 0.1 * (rows * torch.tensor([7, 10])).sum(), rtol=1e-5, atol=1e-4)

    settings = replace(ROUTED, router="token_choice", router_balance="bias")
    objective, model, routing, (total, plain), _ = routed_loss(source, settings)
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-4)
    router = model.model.routers[0]
    load = torch.bincount(routing.depths.flatten(), minlength=2)
    assert router.load.tolist() == load.tolist()
    assert load[0] != load[1]
    objective.begin_step(1, 10)
    assert router.bias.tolist() == pytest.approx([0.001, -0.001] if load[0] < load[1] else [-0.001, 0.001])
    assert not router.load.any()
    objective.begin_step(1, 10)
    assert router.bias.abs().tolist() == pytest.approx([0.001, 0.001])


def test_gradients_reach_routers_and_nothing_else_alone(source):
    """``trainable: routers`` trains them and leaves the model as it was."""
    _, model, _, (total, _), _ = routed_loss(source, ROUTED)
    total.backward()
    for router in model.model.routers:
        assert router.weight.grad.abs().max() > 0


def test_capacities_warm_up(source):
    """From all tokens to those of the config, over half of ten steps; then they stay."""
    model = RecursiveForCausalLM.from_pretrained(source).train()
    objective = Routers(replace(ROUTED, router_warmup_fraction=0.5), None)
    objective.prepare(model)
    ids, found = random_ids(1, 20), []
    for step in range(7):
        objective.begin_step(step, 10)
        found.append(int(model.model(ids, use_cache=False).routing.selected[1].sum()))
    assert found == [int(warmed_up(0.5, step / 5) * 20) for step in range(7)]
    assert (found[0], found[5], found[6]) == (20, 10, 10)
    objective.finish(model)
    assert model.model.training_capacities is None


# --- Figures -------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    """Of six tokens that are learnt: loads, how far they are off, words that never go deep, and agreement."""
    keep = torch.tensor([[True, True, True, True], [True, True, False, False]])
    everything = torch.ones(2, 4, dtype=torch.bool)
    deep = torch.tensor([[True, False, False, True], [False, False, True, True]])
    logits = torch.tensor([[1.0, -1.0, 2.0, 3.0], [-1.0, -2.0, 0.0, -1.0]])
    routing = Routing([logits, logits], [], [everything, everything], [everything, deep])
    figures = RouterFigures(routing, keep, [1.0, 0.5])
    assert figures.loads().tolist() == pytest.approx([1, 1 / 3])
    assert float(figures.max_violation()) == pytest.approx(1 / 3)
    # Word 7 goes deep once, 8 where it is not learnt, 9 never.
    ids = torch.tensor([[7, 7, 9, 7], [8, 9, 8, 8]])
    assert float(figures.dead_tokens(ids, 10)) == pytest.approx(3 / 6)
    assert float(figures.sampling_accuracy(1, training=True, threshold=0.5)) == pytest.approx(6 / 8)
    # The best two of each row: 2 and 3; 2, and of the equal ones the first.
    assert float(figures.sampling_accuracy(1, training=False, threshold=0.5)) == pytest.approx(6 / 8)
    assert float(RouterFigures(routing, keep, None).max_violation()) == pytest.approx(1 / 3)


# --- Runs ----------------------------------------------------------------------------------------------------------


def test_routers_learn_to_be_judged_alone(source, trained):
    """After training, the score of a token says in most cases whether it is among the best; the loss falls."""
    output, result = trained
    assert result.before["load_depth_1"] == 1, "until they are trained, all tokens go everywhere"
    assert result.after["load_depth_0"] == 1
    assert result.after["load_depth_1"] == pytest.approx(0.5, abs=0.1), "by thresholds chosen on training text"
    assert result.after["sampling_accuracy_depth_1"] > 0.75
    assert result.after["perplexity"] < result.before["perplexity"]
    lines = [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["router_loss"] < lines[0]["router_loss"]
    assert {"load_depth_1", "dead_tokens", "max_violation", "sampling_accuracy_depth_1"} <= lines[0].keys()
    config = json.loads((output / "config.json").read_text())
    assert (config["router"], config["router_gate"], config["router_kv"]) == (
        "expert_choice",
        "residual",
        "recursion_wise",
    )
    assert config["router_thresholds"][0] == 0, "all tokens go into a recursion of capacity 1"
    assert 0 < config["router_thresholds"][1] < 1
    assert (output / "recursive_routing.py").exists()
    model = RecursiveForCausalLM.from_pretrained(output).eval()
    text = model.generate(random_ids(1, 8), max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 16)


def test_without_calibration_scores_decide_at_even_odds(source, tmp_path):
    """Few steps teach which tokens are better, and not where the line is: loads are then what comes of it."""
    settings = replace(ROUTED, router_calibrate=False, max_tokens=512)
    result = uptrain_model(source, tmp_path / "out", settings=settings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router_thresholds"] is None
    model = RecursiveForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        routing = model.model(random_ids(2, 16), use_cache=False).routing
    assert torch.equal(routing.selected[1], routing.logits[1] >= 0)
    assert result.after["load_depth_1"] != pytest.approx(0.5, abs=0.1)


def test_token_choice_runs_with_a_bias(source, tmp_path):
    """The bias has moved from where it was, by whole steps of its rate; loads are counted."""
    settings = replace(ROUTED, router="token_choice", router_balance="bias", router_kv="shared", kl_weight=1.0)
    result = uptrain_model(source, tmp_path / "out", settings=settings)
    bias = weights(tmp_path / "out")["model.routers.0.bias"]
    assert bias.abs().max() > 0
    torch.testing.assert_close((bias / 0.001).round() * 0.001, bias, atol=1e-6, rtol=0)
    assert not weights(tmp_path / "out")["model.routers.0.load"].any()
    assert result.after["load_depth_0"] == 1


def test_frozen_base(source, tmp_path):
    """``routers`` trains routers alone."""
    uptrain_model(source, tmp_path / "out", settings=replace(ROUTED, trainable="routers"))
    before, after = weights(source), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name.rpartition(".")[0] for name in after.keys() - before.keys()} == {"model.routers.0", "model.routers.1"}
    assert all(after[f"model.routers.{depth}.weight"].abs().max() > 0 for depth in range(2))


def without_ties(folder) -> UptrainSettings:
    """Settings under which rounding does not choose.

    Adam makes of a gradient near zero, which a new router has many of, a whole step in whatever direction rounding
    says. And documents in one row that begin with the same word begin with the same state: which of those words is
    among the best is rounding, too. So the text is one document.
    """
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 9))) for _ in range(200)]
    (folder / "text.txt").write_text(" ".join(generator.choices(words, k=4000)), encoding="utf-8")
    return replace(ROUTED, optimizer="sgd", learning_rate=0.05, data=(str(folder / "text.txt"),))


@pytest.mark.parametrize(
    "more",
    [
        {"router_warmup_fraction": 0.5},
        {"router": "token_choice", "router_balance": "bias", "router_kv": "shared"},
    ],
)
def test_two_processes_are_one(source, tmp_path, more):
    """DDP over two ranks with half the batch each, also where ranks route different numbers of tokens."""
    settings = replace(without_ties(tmp_path), **more)
    uptrain_model(source, tmp_path / "one", settings=settings)
    run(tmp_path / "log", source, tmp_path / "two", replace(settings, batch_size=2), world_size=2)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_sharded_processes_are_one(source, tmp_path):
    """FSDP2: every rank runs every layer, whatever its tokens do."""
    settings = replace(without_ties(tmp_path), router="token_choice")
    uptrain_model(source, tmp_path / "one", settings=settings)
    sharded = replace(settings, batch_size=2, sharding="fsdp2")
    run(tmp_path / "log", source, tmp_path / "two", sharded, world_size=2)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_runs_resume(source, tmp_path):
    """A run cut at a checkpoint goes on to the same losses and weights, the bias included."""
    settings = replace(ROUTED, router="token_choice", router_balance="bias", save_every=3)
    assert_resumes(source, tmp_path, settings)


def test_healing_a_routed_model(trained, tmp_path):
    """It stays routed, its routers frozen."""
    output, _ = trained
    result = uptrain_model(output, tmp_path / "out", settings=replace(BASE, kl_weight=0.0))
    before, after = weights(output), weights(tmp_path / "out")
    assert torch.equal(before["model.routers.1.weight"], after["model.routers.1.weight"])
    assert "ce_depth_0" in result.after


def test_routers_stay_unless_others_are_asked_for(source, caplog):
    """A second run keeps them; asking for others replaces them, and says so."""
    model = RecursiveForCausalLM.from_pretrained(source)
    Routers(replace(ROUTED, router_width="mlp", router_capacities=(1.0, 0.25)), None).prepare(model)
    routers = model.model.routers
    Routers(ROUTED, None).prepare(model)
    assert model.model.routers is routers
    assert not caplog.text
    Routers(replace(ROUTED, router_width="linear"), None).prepare(model)
    assert (model.config.router_width, model.config.router_capacities) == ("linear", [1.0, 0.25])
    assert "The model's expert_choice routers are replaced by new expert_choice ones" in caplog.text


def test_what_cannot_be_trained_is_refused(source, trained, tmp_path):
    """No boundaries, unknown routers, capacities that rise, routers outside their stage, other stages after it."""
    convert_tiny(source.parent / "dense", tmp_path / "sequence", sharing="sequence")
    with pytest.raises(SettingsError, match="in sequence sharing has no boundary"):
        uptrain_model(tmp_path / "sequence", tmp_path / "a", settings=ROUTED)
    with pytest.raises(SettingsError, match="Unknown router 'mine'"):
        uptrain_model(source, tmp_path / "b", settings=replace(ROUTED, router="mine"))
    with pytest.raises(SettingsError, match=r"rise from 0\.5 to 1 at depth 1"):
        uptrain_model(source, tmp_path / "c", settings=replace(ROUTED, router_capacities=(0.5, 1.0)))
    with pytest.raises(SettingsError, match="Unknown router_balance 'luck'"):
        replace(ROUTED, router_balance="luck")
    with pytest.raises(SettingsError, match="router_weight must be a number of at least 0, got -1"):
        replace(ROUTED, router_weight=-1)
    for stage in ("exits", "tie", "layers"):
        with pytest.raises(SettingsError, match=f"Stage '{stage}' does not support routed models"):
            uptrain_model(trained[0], tmp_path / "d", settings=replace(BASE, stage=stage))
