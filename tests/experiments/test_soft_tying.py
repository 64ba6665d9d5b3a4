"""Soft tying: from the dense layers to one shared layer."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.processes import run
from helpers.runs import BASE, assert_identical, assert_same, make_source, weights
from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.errors import CheckpointError, SettingsError
from recursify.experiments.soft_tying import SoftTiedLinear, SoftTying, draw_mixture, tied_fraction
from recursify.modeling import RecursiveForCausalLM, RelaxedLinear
from recursify.uptrain import checkpoints
from recursify.uptrain.param_groups import freeze_untrained, is_per_depth
from recursify.uptrain.run import check_settings, uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("uptraining")

TIE = replace(BASE, stage="tie", max_tokens=8 * 4 * 32, save_every=2, eval_every=4, keep=4)
IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A recursive model of three recursions with its dense teacher beside it. Its residuals do not cancel out."""
    return make_source(tmp_path_factory.mktemp("tie"), "qwen2", num_recursions=3, sharing="cycle")


@pytest.fixture
def prepared(source):
    """An untied model in training mode, its objective, and the dense model."""
    dense = open_checkpoint(str(source.parent / "dense")).load_model(torch.float32)
    model = RecursiveForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    objective = SoftTying(TIE, dense)
    objective.prepare(model)
    return model, objective, dense


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """The run that the others are compared with."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    return output, uptrain_model(source, output, settings=TIE)


def stand_ins(model) -> list[SoftTiedLinear]:
    return [module for module in model.modules() if isinstance(module, SoftTiedLinear)]


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
@pytest.mark.parametrize("tie_norms", [False, True])
def test_starts_as_the_dense_model(tmp_path, sharing, tie_norms):
    """At step 0 every depth is its dense layer, whatever is tied in which order; tied norms and biases stay tied."""
    save_tiny(tmp_path / "dense", "qwen2")
    options = {"num_recursions": 2, "sharing": sharing, "lora_rank": 4, "tie_norms": tie_norms}
    model = convert_tiny(tmp_path / "dense", tmp_path / "recursive", **options).float().train()
    dense = open_checkpoint(str(tmp_path / "dense")).load_model(torch.float32)
    objective = SoftTying(TIE, dense)
    objective.prepare(model)
    objective.begin_step(0, 8)
    with torch.no_grad():
        found, wanted = model(IDS, use_cache=False).logits, dense(IDS).logits
    if not tie_norms:
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(model.model.block):
        for path, module in layer.stored_modules():
            for depth, position in enumerate(model.config.layout.positions(index)):
                if isinstance(module, SoftTiedLinear):
                    weight = module.linear.mixed(depth) + module.lora_b[depth] @ module.lora_a[depth]
                    wanted = dense.get_parameter(f"model.layers.{position}.{path}.weight")
                    torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=1e-5)


def test_evaluates_and_ends_as_the_folder(source, prepared):
    """Untrained, the mean of the candidates is the folder's own shared weight, in evaluation and once collapsed."""
    model, objective, _ = prepared
    folder = RecursiveForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    objective.begin_step(3, 8)
    with torch.no_grad():
        wanted = folder(IDS).logits
        assert not torch.allclose(model(IDS, use_cache=False).logits, wanted, atol=1e-2)
        torch.testing.assert_close(model.eval()(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
        objective.finish(model)
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)


def test_collapses_to_the_mean_of_the_candidates(source, prepared):
    """As many parameters and the same names as the folder's model; the logits are those of the mean weights."""
    model, objective, _ = prepared
    folder = RecursiveForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in stand_ins(model):
            module.linear.weight += 0.1 * torch.randn(module.linear.weight.shape, generator=generator)
        for module in folder.modules():
            if isinstance(module, RelaxedLinear):
                module.linear.weight.zero_()
        state = model.state_dict()
        for name, parameter in folder.named_parameters():
            parameter.copy_(state[name].mean(0) if state[name].ndim > parameter.ndim else state[name])
        objective.finish(model)
        assert not stand_ins(model)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in folder.named_parameters()}
        torch.testing.assert_close(model.eval()(IDS).logits, folder.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


def test_mixtures_are_convex_and_end_at_the_mean():
    """Reproducible from seed and step; one-hot at first, on average as scheduled, exactly the mean at the end."""
    settings = replace(TIE, tie_fraction=0.75)
    for step in range(1000):
        mixture = draw_mixture(settings, 3, step, 1000)
        assert mixture == draw_mixture(settings, 3, step, 1000)
        if step >= 750:
            assert mixture.weights is None
            assert mixture.offset_scale == 0
            continue
        assert all(min(row) >= 0 and sum(row) == pytest.approx(1) for row in mixture.weights)
        assert mixture.offset_scale == pytest.approx(1 - step / 750)
    start = draw_mixture(settings, 3, 0, 1000)
    assert start.weights == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert start.offset_scale == 1
    assert draw_mixture(settings, 3, 300, 1000) != draw_mixture(replace(settings, seed=1), 3, 300, 1000)
    drawn = torch.tensor([draw_mixture(replace(settings, seed=s), 3, 375, 1000).weights for s in range(4000)])
    wanted = 0.5 * torch.eye(3) + 0.5 / 3
    torch.testing.assert_close(drawn.mean(0), wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.var(0), 0.25 * wanted * (1 - wanted) / 4, atol=0.002, rtol=0)
    still = draw_mixture(replace(settings, tie_noise=0.0), 3, 375, 1000)
    torch.testing.assert_close(torch.tensor(still.weights), wanted)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("max_steps", [1, 2, 7])
def test_the_last_step_trains_the_mean(fraction, max_steps):
    """Also of the shortest run."""
    settings = replace(TIE, tie_fraction=fraction)
    shares = [tied_fraction(settings, step, max_steps) for step in range(max_steps)]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_candidates_are_shared_weights(prepared):
    """By name: ``shared`` trains them, ``lora`` does not, and they have the shared learning rate."""
    model, _, _ = prepared
    candidates = {name for name, p in model.named_parameters() if ".block." in name and name.endswith("linear.weight")}
    assert len(candidates) == len(stand_ins(model))
    assert not any(map(is_per_depth, candidates))
    freeze_untrained(model, replace(BASE, trainable="shared"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == candidates


def test_ties_and_writes_an_ordinary_model(source, plain):
    """The figures before are the folder's, those after the written model's, and the loss of the mean falls."""
    output, result = plain
    assert result.steps == 8
    assert {n: w.shape for n, w in weights(output).items()} == {n: w.shape for n, w in weights(source).items()}
    healed = output.with_name("healed")
    before = uptrain_model(source, healed, settings=replace(TIE, stage="heal")).before
    assert result.before["ce"] == pytest.approx(before["ce"], rel=1e-5)
    assert result.after["perplexity"] < 0.9 * result.before["perplexity"]
    again = uptrain_model(output, output.with_name("again"), settings=replace(TIE, stage="heal")).before
    assert again["ce"] == pytest.approx(result.after["ce"], rel=1e-5)


def test_resumes_to_the_same_run(source, plain, tmp_path):
    """From a checkpoint of several candidates, before and after the depths have become one, and from the last."""
    for kept in (2, 6, 8):
        output = tmp_path / f"from-{kept}"
        shutil.copytree(plain[0], output)
        for checkpoint in checkpoints.list_checkpoints(output / "checkpoints"):
            if checkpoints.step_of(checkpoint) > kept:
                shutil.rmtree(checkpoint)
        (output / "config.json").unlink()
        uptrain_model(source, output, settings=TIE, resume=True)
        assert_identical(output, plain[0])


def test_a_checkpoint_of_candidates_is_no_model(source, plain):
    """Loading one is an error, not a model with weights made up."""
    newest = checkpoints.list_checkpoints(plain[0] / "checkpoints")[-1]
    tensors = load_file(newest / "model.safetensors")
    assert tensors["model.block.0.mlp.up_proj.linear.weight"].shape[0] == 3
    with pytest.raises(RuntimeError, match="mismatch"):
        RecursiveForCausalLM.from_pretrained(newest)


def test_checkpointing_changes_nothing(source, plain, tmp_path):
    """Activations are recomputed with the mixture they were computed with."""
    uptrain_model(source, tmp_path / "out", settings=replace(TIE, gradient_checkpointing=True))
    assert_same(plain[0], tmp_path / "out")


def test_accumulation_changes_nothing(source, plain, tmp_path):
    """All micro-batches of a step have its mixture."""
    uptrain_model(source, tmp_path / "out", settings=replace(TIE, batch_size=1, accumulate=4))
    assert_same(plain[0], tmp_path / "out")


def test_two_processes_are_one(source, plain, tmp_path):
    """DDP over two ranks with half the batch each."""
    run(tmp_path / "log", source, tmp_path / "out", replace(TIE, batch_size=2), world_size=2)
    assert_same(plain[0], tmp_path / "out")


def test_needs_the_dense_layers(source, tmp_path):
    """Also where nothing is distilled; a teacher with other layers is refused."""
    uptrain_model(source, tmp_path / "data-alone", settings=replace(TIE, kl_weight=0.0))
    save_tiny(tmp_path / "other", "qwen2", intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp.*' must be \[48, 32\], but is \[40, 32\]"):
        uptrain_model(source, tmp_path / "a", settings=replace(TIE, teacher=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match=r"The teacher does not open.*Give another --teacher\.$"):
        uptrain_model(source, tmp_path / "b", settings=replace(TIE, teacher="nowhere", kl_weight=0.0))


def test_settings_have_ranges():
    """The share of the run that trains the mean is never empty."""
    with pytest.raises(SettingsError, match=r"tie_fraction must be a number of at least 0 and below 1, got 1\.0"):
        UptrainSettings(tie_fraction=1.0)
    with pytest.raises(SettingsError, match="Stage 'tie' does not support sharding 'fsdp2'"):
        check_settings(UptrainSettings(stage="tie", sharding="fsdp2"))
    with pytest.raises(SettingsError, match=r"tie_noise must be a number of at least 0 and at most 1, got -1"):
        UptrainSettings(tie_noise=-1)
