"""Layer-wise healing on tiny models: that it heals, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers.processes import run
from helpers.runs import make_source
from helpers.tiny_models import convert_tiny, save_tiny
from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, open_checkpoint
from recursify.convert.parity import fold_exactly
from recursify.errors import CheckpointError, OutputError, SettingsError, TrainingError
from recursify.evaluation.text import default_text
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.callbacks import read_metrics
from recursify.uptrain.run import check_settings, uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("uptraining")

LENGTH = 32
BASE = UptrainSettings(
    stage="layers",
    length=LENGTH,
    batch_size=4,
    max_tokens=4 * 8 * 4 * LENGTH,
    layer_tokens=8 * 4 * LENGTH,
    layer_passes=2,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> UptrainSettings:
    """Two passes over 1 024 tokens, twice; texts are documents shorter and longer than a sequence."""
    folder = tmp_path_factory.mktemp("text")
    documents = default_text("calibration").documents[:60]
    rows = [{"text": document[: 20 + 40 * (index % 3)]} for index, document in enumerate(documents)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = default_text("held_out").documents[0][: 8 * LENGTH]
    (folder / "held_out.txt").write_text(held_out)
    return replace(
        BASE, data=(str(folder / "rows.jsonl"),), eval_data=(str(folder / "held_out.txt"),), learning_rate=3e-3
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("layers"))


def layer_lines(output):
    return [line for line in read_metrics(output / "metrics.jsonl") if "layer" in line]


def test_every_layer_gets_nearer_and_so_does_the_model(family, settings, tmp_path):
    """Whatever the family's layers do beside their weights: norms around them, windows, no RoPE, two paths at once."""
    result = uptrain_model(make_source(tmp_path, family), tmp_path / "out", settings=settings)
    lines = layer_lines(tmp_path / "out")
    assert [line["layer"] for line in lines] == [0, 1, 0, 1]
    assert all(line["error_after"] < line["error_before"] for line in lines)
    assert result.after["kl"] < result.before["kl"]
    assert result.after["dense_ce"] == result.before["dense_ce"]


@pytest.mark.parametrize(
    "layout",
    [
        {"sharing": "sequence"},
        {"num_prelude_layers": 1, "num_coda_layers": 2, "num_recursions": 3},
        {"num_recursions": 2, "tie_norms": True, "sharing": "cycle"},
        {"lora_rank": 0},
    ],
    ids=["sequence", "three recursions", "tied norms", "no residuals"],
)
def test_other_layouts(layout, settings, tmp_path):
    """Errors and divergence fall, however positions fold."""
    result = uptrain_model(make_source(tmp_path, **layout), tmp_path / "out", settings=settings)
    assert all(line["error_after"] < line["error_before"] for line in layer_lines(tmp_path / "out"))
    assert result.after["kl"] < result.before["kl"]


def test_no_model_is_ever_whole(source, settings, tmp_path, monkeypatch):
    """Neither is loaded, and the folder holds a model with its record and metrics all the same."""

    def refuse(*_, **__):
        raise AssertionError("a whole model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(DenseCheckpoint, "load_model", refuse)
        patch.setattr(RecursiveForCausalLM, "from_pretrained", refuse)
        result = uptrain_model(source, tmp_path / "out", settings=settings)
    assert result.tokens == settings.max_tokens
    assert result.steps == settings.max_tokens // (4 * LENGTH)
    model = RecursiveForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    record = json.loads((tmp_path / "out" / "recursify.json").read_text())["history"][-1]
    assert record["settings"]["stage"] == "layers"
    assert record["after"] == result.after
    evaluations = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "eval_kl" in line]
    assert [line["step"] for line in evaluations] == [0, result.steps]


def test_held_out_figures_are_those_of_healing(source, settings, tmp_path):
    """Measured a layer at a time they are what the Trainer measures with both models whole."""
    layers = uptrain_model(source, tmp_path / "layers", settings=replace(settings, max_tokens=1))
    heal = uptrain_model(source, tmp_path / "heal", settings=replace(settings, stage="heal", max_tokens=1))
    assert layers.before.keys() == {name for name in heal.before if "_depth_" not in name}
    for name, value in layers.before.items():
        assert value == pytest.approx(heal.before[name], rel=1e-4), name


def test_only_what_is_asked_is_trained(source, settings, tmp_path):
    """Never prelude, coda, embedding and head; of the block, what ``trainable`` names."""
    before = load_file(source / "model.safetensors")
    for trainable, belongs in (
        ("all", lambda name: ".block." in name),
        ("lora", lambda name: ".block." in name and not name.endswith(".linear.weight")),
        ("shared", lambda name: ".block." in name and name.endswith(".linear.weight")),
    ):
        uptrain_model(source, tmp_path / trainable, settings=replace(settings, trainable=trainable))
        after = load_file(tmp_path / trainable / "model.safetensors")
        changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
        assert changed == {name for name in before if belongs(name)}


@pytest.mark.parametrize("num_recursions", [1, 2])
def test_a_model_that_is_the_dense_one_stays_it(num_recursions, settings, tmp_path):
    """One recursion, or residuals of full rank: there is nothing to learn, and rounding is not learnt either."""
    dense = save_tiny(tmp_path / "dense")
    convert_tiny(tmp_path / "dense", tmp_path / "source", num_recursions=num_recursions, sharing="cycle")
    model = fold_exactly(dense, num_recursions)
    model.save_pretrained(tmp_path / "source")
    result = uptrain_model(tmp_path / "source", tmp_path / "out", settings=settings)
    assert all(line["error_after"] <= line["error_before"] < 1e-9 for line in layer_lines(tmp_path / "out"))
    assert result.after["kl"] < 1e-6
    assert result.after["agreement"] == 1


def test_error_of_a_hand_made_difference(settings, tmp_path):
    """A block whose layers do nothing leaves the residual stream: the error is what the dense layer adds to it."""
    source = make_source(tmp_path, num_recursions=1, sharing="cycle", lora_rank=0)
    model = RecursiveForCausalLM.from_pretrained(source)
    for layer in model.model.block:
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(path).linear.weight.data.zero_()
    model.save_pretrained(source)
    untrained = replace(settings, learning_rate=1e-30, layer_passes=1, max_tokens=1)
    uptrain_model(source, tmp_path / "out", settings=untrained)
    dense = open_checkpoint(str(tmp_path / "dense")).load_model()
    first, *_ = layer_lines(tmp_path / "out")
    inputs, real = _first_batch(untrained, source)
    apart = {"output_hidden_states": True, "use_cache": False}  # with a cache, packed documents see one another
    with torch.no_grad():
        states = [hidden[real] for hidden in dense(**inputs, **apart).hidden_states]
    expected = ((states[0] - states[1]).square().sum(-1) / states[1].square().sum(-1)).mean()
    assert first["error_before"] == pytest.approx(float(expected), rel=1e-4)


def _first_batch(settings, source):
    """What a run of one batch feeds its layers, and which of it is no padding."""
    from transformers import AutoTokenizer

    from recursify.uptrain.data import Collator, prepare_data

    rows = prepare_data(settings, AutoTokenizer.from_pretrained(source), 260).train.select(range(settings.batch_size))
    batch = Collator(LENGTH, 0)(list(rows))
    real = torch.tensor([[place < len(row["input_ids"]) for place in range(LENGTH)] for row in rows])
    return {name: batch[name] for name in ("input_ids", "position_ids")}, real


def test_a_layer_that_got_worse_is_left_as_it_was(source, settings, tmp_path):
    """At a learning rate that destroys, the model that comes out is the one that went in; or the run stops."""
    uptrain_model(source, tmp_path / "out", settings=replace(settings, learning_rate=0.3, schedule="constant"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    with pytest.raises(TrainingError, match=r"error of block layer 0 is (nan|inf)\. Use a lower learning rate"):
        uptrain_model(source, tmp_path / "stopped", settings=replace(settings, learning_rate=1e30))


def test_refusals(source, settings, tmp_path):
    """What this stage cannot do, it says before it begins."""
    with pytest.raises(TrainingError, match=r"writes no checkpoints\. Run it again with --overwrite"):
        uptrain_model(source, tmp_path / "a", settings=settings, resume=True)
    with pytest.raises(SettingsError, match="random_recursions: not supported by stage 'layers'"):
        check_settings(replace(settings, random_recursions=True))
    with pytest.raises(SettingsError, match="precision, report_to: not supported by stage 'layers'"):
        check_settings(replace(settings, precision="bfloat16", report_to=("tensorboard",)))
    with pytest.raises(SettingsError, match="layer_tokens must be a whole number of at least 1, got 0"):
        replace(settings, layer_tokens=0)
    with pytest.raises(SettingsError, match="length 512 is longer than the model's context of 256"):
        uptrain_model(source, tmp_path / "b", settings=replace(settings, length=512))
    save_tiny(tmp_path / "other", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.4\..*' must be .* but the teacher does not have it"):
        uptrain_model(source, tmp_path / "c", settings=replace(settings, teacher=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match=r"^The teacher does not open: (?!.*--kl-weight)"):
        uptrain_model(source, tmp_path / "d", settings=replace(settings, teacher="nowhere"))
    with pytest.raises(OutputError, match="exists"):
        uptrain_model(source, source.parent / "dense", settings=settings)


def test_several_processes_are_refused(source, settings, tmp_path):
    """Both ranks say so and end."""
    with pytest.raises(AssertionError, match=r"one process, but 2 were started\. Omit --num-processes"):
        run(tmp_path / "log", source, tmp_path / "out", settings, world_size=2)


@pytest.mark.parametrize("stage", ["layers", "tie"])
def test_recursions_of_another_number_do_not_pair_with_dense_layers(source, settings, tmp_path, stage):
    """The dense model has layers at all positions of a shorter one: the wrong ones."""
    RecursiveForCausalLM.from_pretrained(source).with_recursions(1).save_pretrained(tmp_path / "shorter")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "shorter")
    chosen = UptrainSettings(stage=stage, data=settings.data, length=LENGTH, teacher=str(source.parent / "dense"))
    with pytest.raises(TrainingError, match=f"Stage '{stage}' takes the dense model's layers one by one.*--stage heal"):
        uptrain_model(tmp_path / "shorter", tmp_path / "out", settings=chosen)
    assert not (tmp_path / "out").exists()
