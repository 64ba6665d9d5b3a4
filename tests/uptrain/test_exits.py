"""Training exits: what each loss adds up to, what is trained, and that exits learn."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.processes import run
from helpers.runs import BASE, assert_resumes, assert_same, make_source, packed_batch, weights
from helpers.tiny_models import convert_tiny
from recursify.errors import SettingsError
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.data import IGNORED
from recursify.uptrain.exits import Exits
from recursify.uptrain.losses import layer_distillation
from recursify.uptrain.run import uptrain_model

pytestmark = pytest.mark.xdist_group("uptraining")

EXITS = replace(BASE, stage="exits", kl_weight=0.0, exit_weight=0.5, head_learning_rate=2e-2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Prelude, one shared layer four times, coda: three exits."""
    return make_source(tmp_path_factory.mktemp("exits"), num_recursions=4)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The run that others are compared with."""
    output = tmp_path_factory.mktemp("runs") / "exits"
    settings = replace(EXITS, max_tokens=40 * 4 * 32, eval_every=99, save_every=99)
    return output, uptrain_model(source, output, settings=settings)


def objective_and_parts(source, settings):
    """The loss that the objective returns, and per readout (exits, then last) the summed cross-entropy and logits."""
    model = RecursiveForCausalLM.from_pretrained(source).train()
    objective = Exits(settings, None)
    objective.prepare(model)
    inputs = packed_batch()
    arguments = objective.forward_arguments(model, 4)
    outputs = model.model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False, **arguments)
    total, sums = objective(model, outputs, inputs)
    keep = inputs["labels"][:, 1:] != IGNORED
    targets = inputs["labels"][:, 1:][keep]
    logits = [model.compute_exit_logits(depth, state)[:, :-1][keep] for depth, state in enumerate(outputs.exit_states)]
    logits.append(model.compute_logits(outputs.last_hidden_state)[:, :-1][keep])
    ce = [F.cross_entropy(each, targets, reduction="sum") for each in logits]
    normed = [model.model.norm(state)[:, :-1][keep] for state in outputs.layer_states or ()]
    return total, sums, ce, logits, normed


def test_aggressive_loss_is_its_formula(source):
    """``CE_last + 0.1 Σ_d (CE_d + KL(last ‖ d))`` plus the tests' cross-entropy, which starts at log 2 a token."""
    settings = replace(EXITS, exit_weight=0.1)
    total, sums, ce, logits, _ = objective_and_parts(source, settings)
    kl = [
        F.kl_div(each.log_softmax(-1), logits[-1].log_softmax(-1), log_target=True, reduction="sum")
        for each in logits[:-1]
    ]
    wanted = ce[-1] + 0.1 * (sum(ce[:-1]) + sum(kl)) + 3 * len(logits[0]) * math.log(2)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    assert float(sums["test_loss_depth_1"]) == pytest.approx(len(logits[0]) * math.log(2), rel=1e-6)
    for depth in range(3):
        assert float(sums[f"ce_depth_{depth}"]) == pytest.approx(float(ce[depth].detach()), rel=1e-5)
        same = (logits[depth].argmax(-1) == logits[-1].argmax(-1)).sum()
        assert float(sums[f"agreement_depth_{depth}"]) == float(same)


def test_weighted_loss_is_its_formula(source):
    """``(1 CE_0 + 2 CE_1 + 3 CE_2 + 4 CE_last) / 10``."""
    settings = replace(EXITS, exit_loss="weighted", exit_kl_weight=0.0, test_weight=0.0)
    total, _, ce, _, _ = objective_and_parts(source, settings)
    wanted = sum((index + 1) * each for index, each in enumerate(ce)) / 10
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("coda", [0, 1])
@pytest.mark.parametrize("kind", [None, "kd_last", "kd_unif", "kd_dyna"])
def test_free_loss_is_its_formula(source, kind, coda):
    """Cross-entropies by layers run (2, 3, 4 of 6, plus the coda where exits run it), and half the distillation."""
    settings = replace(EXITS, exit_loss="free", free_distillation=kind, test_weight=0.0, exit_through_coda=coda > 0)
    total, _, ce, _, normed = objective_and_parts(source, settings)
    layers = [2 + coda, 3 + coda, 4 + coda, 6]
    wanted = sum(count * each for count, each in zip(layers, ce, strict=True)) / sum(layers)
    if kind is not None:
        # What the coda makes of a state teaches nothing where the exit is followed by it as well.
        states = normed[: 6 - coda]
        wanted = wanted + 0.5 * sum(layer_distillation(states, shallow, kind) for shallow in (2, 3, 4)) / 3
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)


def test_fewer_recursions_have_fewer_exits(source):
    """A step of two recursions has one exit, and FREE's weights count the layers that ran."""
    model = RecursiveForCausalLM.from_pretrained(source).train()
    objective = Exits(replace(EXITS, exit_loss="free"), None)
    assert objective.forward_arguments(model, 2)["exit_depths"] == (0,)
    assert objective.forward_arguments(model, 1)["exit_depths"] == ()
    assert objective.coefficients(model.config, 1) == pytest.approx([3 / 7, 4 / 7])
    assert [model.config.layout.layers_before(depth) for depth in range(3)] == [2, 3, 4]


def test_the_test_teaches_nothing_but_itself(source):
    """With only its term, the gradient of every other weight is zero."""
    model = RecursiveForCausalLM.from_pretrained(source).train()
    settings = replace(EXITS, ce_weight=0.0, exit_weight=0.0)
    objective = Exits(settings, None)
    objective.prepare(model)
    inputs = packed_batch()
    outputs = model.model(inputs["input_ids"], use_cache=False, **objective.forward_arguments(model, 4))
    objective(model, outputs, inputs)[0].backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        assert moved == (".test." in name), name


def test_exits_learn(source, trained):
    """Agreement with the last recursion rises at every depth, and the test beats always saying the same."""
    output, result = trained
    for depth in range(3):
        before, after = (figures[f"agreement_depth_{depth}"] for figures in (result.before, result.after))
        assert after > before
        assert result.after[f"perplexity_depth_{depth}"] < result.before[f"perplexity_depth_{depth}"]
        assert result.after[f"test_loss_depth_{depth}"] < math.log(2)
    model = RecursiveForCausalLM.from_pretrained(output)
    assert (model.config.exit_head, model.config.exit_through_coda) == ("shared", True)
    assert json.loads((output / "config.json").read_text())["exit_head"] == "shared"
    assert (output / "recursive_exits.py").exists()


def test_frozen_base(source, tmp_path):
    """``heads`` trains exit heads alone; the last recursion's perplexity stays what it was."""
    settings = replace(EXITS, trainable="heads", exit_head="low_rank", exit_rank=3)
    result = uptrain_model(source, tmp_path / "out", settings=settings)
    before, after = weights(source), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[2] for name in after.keys() - before.keys()} == {"norm", "lora_a", "lora_b", "test"}
    assert result.after["perplexity"] == pytest.approx(result.before["perplexity"], rel=1e-6)
    assert result.after["perplexity_depth_0"] < result.before["perplexity_depth_0"]


def test_exits_in_two_processes_are_in_one(source, tmp_path):
    """DDP over two ranks with half the batch each, random recursion counts, own heads."""
    settings = replace(EXITS, exit_head="norm", random_recursions=True, recursion_curriculum=0.0)
    uptrain_model(source, tmp_path / "one", settings=settings)
    run(tmp_path / "log", source, tmp_path / "two", replace(settings, batch_size=2), world_size=2)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_exits_resume(source, tmp_path):
    """A run cut at a checkpoint goes on to the same losses and weights, heads included."""
    settings = replace(EXITS, exit_head="full", exit_loss="free", save_every=3)
    assert_resumes(source, tmp_path, settings)


def test_healing_leaves_heads_as_they_are(trained, tmp_path):
    """A model with exits can be healed further: its heads are frozen, and measured."""
    output, _ = trained
    result = uptrain_model(output, tmp_path / "out", settings=BASE)
    before, after = weights(output), weights(tmp_path / "out")
    heads = [name for name in before if name.startswith("exit_heads.")]
    assert heads
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert "agreement_depth_2" in result.after


def test_heads_stay_unless_others_are_asked_for(source, caplog):
    """A second run keeps the heads and where they read out; asking for others replaces them, and says so."""
    model = RecursiveForCausalLM.from_pretrained(source)
    Exits(replace(EXITS, exit_head="low_rank", exit_rank=3, exit_through_coda=False), None).prepare(model)
    heads = model.exit_heads
    Exits(EXITS, None).prepare(model)
    assert model.exit_heads is heads
    assert not caplog.text
    Exits(replace(EXITS, exit_head="norm"), None).prepare(model)
    assert (model.config.exit_head, model.config.exit_through_coda) == ("norm", False)
    assert "The model's low_rank exit heads are replaced by new norm ones" in caplog.text


def test_what_cannot_be_trained_is_refused(source, tmp_path):
    """No boundaries, unknown heads and losses, heads outside their stage."""
    folder = source.parent
    convert_tiny(folder / "dense", tmp_path / "sequence", sharing="sequence")
    with pytest.raises(SettingsError, match="in sequence sharing has no boundary"):
        uptrain_model(tmp_path / "sequence", tmp_path / "a", settings=EXITS)
    with pytest.raises(SettingsError, match="Unknown exit_head 'mine'"):
        uptrain_model(source, tmp_path / "b", settings=replace(EXITS, exit_head="mine"))
    with pytest.raises(SettingsError, match=r"Unknown exit_loss 'kind'\. Use one of: aggressive, weighted, free"):
        replace(EXITS, exit_loss="kind")
    with pytest.raises(SettingsError, match="exit_weight must be a number of at least 0, got -1"):
        replace(EXITS, exit_weight=-1)
