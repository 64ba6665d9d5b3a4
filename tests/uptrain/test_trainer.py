"""Uptraining runs on tiny models: what must not change the result, and what must stop a run."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.processes import run, start_run
from helpers.runs import BASE, assert_same, losses, weights
from helpers.tiny_models import convert_tiny, save_tiny
from helpers.tolerances import LOSSES
from recursify.errors import CheckpointError, OutputError, RecursifyError, SettingsError, TrainingError
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain import checkpoints
from recursify.uptrain.callbacks import read_metrics
from recursify.uptrain.exits import Exits
from recursify.uptrain.run import check_settings, uptrain_model
from recursify.uptrain.settings import UptrainSettings

pytestmark = pytest.mark.xdist_group("uptraining")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A recursive model with its dense teacher beside it."""
    folder = tmp_path_factory.mktemp("uptrain")
    save_tiny(folder / "dense")
    convert_tiny(folder / "dense", folder / "recursive", lora_rank=4)
    return folder / "recursive"


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """The run that the others are compared with."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    outcome = uptrain_model(source, output, settings=BASE)
    return output, outcome


def test_heals(source, plain):
    """Loss falls; the folder is a model with its record, metrics and curves; the source is untouched."""
    output, outcome = plain
    assert outcome.steps == 6
    assert outcome.tokens == 6 * 4 * 32
    assert outcome.after["perplexity"] < 0.8 * outcome.before["perplexity"]
    assert outcome.after["dense_ce"] == outcome.before["dense_ce"]
    model = RecursiveForCausalLM.from_pretrained(output)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    run_record = json.loads((output / "recursify.json").read_text())["history"][-1]
    assert run_record["tokens"] == outcome.tokens
    assert run_record["after"] == outcome.after
    assert json.loads((source / "recursify.json").read_text())["history"] == []
    assert (output / "curves.png").stat().st_size > 10_000
    steps = [line["step"] for line in read_metrics(output / "metrics.jsonl") if "eval_loss" in line]
    assert steps == [0, 3, 6]


def test_accumulation_changes_nothing(source, plain, tmp_path):
    """Four micro-batches of one sequence are one batch of four, although documents differ in length."""
    uptrain_model(source, tmp_path / "out", settings=replace(BASE, batch_size=1, accumulate=4))
    assert_same(plain[0], tmp_path / "out")


def test_checkpointing_changes_nothing(source, plain, tmp_path):
    """Recomputed activations, the same losses and weights."""
    uptrain_model(source, tmp_path / "out", settings=replace(BASE, gradient_checkpointing=True))
    assert_same(plain[0], tmp_path / "out")


def test_two_processes_are_one(source, plain, tmp_path):
    """DDP over two ranks with half the batch each."""
    run(tmp_path / "log", source, tmp_path / "out", replace(BASE, batch_size=2), world_size=2)
    assert_same(plain[0], tmp_path / "out")


def test_bfloat16_is_near_float32(source, plain, tmp_path):
    """Matrix products in 8 bits of mantissa, teacher and held-out figures included; weights and optimizer in 24."""
    uptrain_model(source, tmp_path / "out", settings=replace(BASE, precision="bfloat16"))
    mine, theirs = read_metrics(tmp_path / "out" / "metrics.jsonl"), read_metrics(plain[0] / "metrics.jsonl")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, other in zip(mine, theirs, strict=True):
        for name in {"loss", "eval_ce", "eval_dense_ce", "eval_kl"} & line.keys():
            assert line[name] == pytest.approx(other[name], abs=LOSSES[torch.bfloat16]), (line["step"], name)
            assert line[name] != other[name], (line["step"], name)
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {torch.float32}
    state = torch.load(checkpoints.list_checkpoints(tmp_path / "out" / "checkpoints")[-1] / "optimizer.pt")["state"]
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}


def test_random_recursions_do_not_hang_and_agree(source, tmp_path):
    """Two ranks draw the same counts as one; some steps run fewer recursions."""
    settings = replace(BASE, random_recursions=True, recursion_curriculum=0.0, seed=3)
    uptrain_model(source, tmp_path / "one", settings=settings)
    run(tmp_path / "log", source, tmp_path / "two", replace(settings, batch_size=2), world_size=2)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_only_what_is_asked_is_trained(source, plain, tmp_path):
    """``lora``: residuals, per-depth norms; ``shared``: the shared weights."""
    before = weights(source)
    for trainable, belongs in (
        ("lora", lambda name: ".block." in name and not name.endswith(".linear.weight")),
        ("shared", lambda name: ".block." in name and name.endswith(".linear.weight")),
    ):
        uptrain_model(source, tmp_path / trainable, settings=replace(BASE, trainable=trainable))
        after = weights(tmp_path / trainable)
        changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
        assert changed == {name for name in before if belongs(name)}


def test_killed_ten_times_at_random_moments(source, tmp_path):
    """``kill -9``: the losses are those of a run that was not killed, step for step."""
    settings = replace(BASE, max_tokens=40 * 4 * 32, save_every=3, eval_every=20)
    uptrain_model(source, tmp_path / "whole", settings=settings)
    moments = random.Random(time.time_ns())
    kills = attempts = 0
    while kills < 10:
        output, begun, finished = tmp_path / f"killed-{attempts}", False, False
        attempts += 1
        while not finished:
            process = start_run(tmp_path / "log", source, output, settings, resume=begun)
            process.join(moments.uniform(0.5, 2.0) if kills < 10 else 120)
            finished = process.exitcode is not None
            if not finished:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            begun = (output / "checkpoints" / "run.json").exists()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert losses(output) == losses(tmp_path / "whole")
        mine, theirs = weights(output), weights(tmp_path / "whole")
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_damaged_checkpoint_is_skipped(source, plain, tmp_path, caplog):
    """With a warning; the run goes on from the one before and ends the same."""
    output = tmp_path / "out"
    uptrain_model(source, output, settings=BASE)
    newest = checkpoints.list_checkpoints(output / "checkpoints")[-1]
    data = bytearray((newest / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(bytes(data))
    uptrain_model(source, output, settings=BASE, resume=True)
    assert "is damaged (optimizer.pt has another checksum)" in caplog.text
    assert_same(plain[0], output, tolerance=0)


def test_resume_with_other_settings(source, plain, tmp_path):
    """The key is named, with both values."""
    with pytest.raises(SettingsError, match=r"'learning_rate' was 0\.005 when the run .* started, and is 0\.1 now"):
        uptrain_model(source, plain[0], settings=replace(BASE, learning_rate=0.1), resume=True)
    with pytest.raises(TrainingError, match="has no run to resume"):
        uptrain_model(source, tmp_path / "nowhere", settings=BASE, resume=True)
    with pytest.raises(OutputError, match="already contains a run"):
        uptrain_model(source, plain[0], settings=BASE)


def test_nan_stops_and_keeps_the_last_good_checkpoint(source, tmp_path):
    """The message says at which step and names the checkpoint, which holds no NaN."""
    output = tmp_path / "out"
    settings = replace(BASE, learning_rate=1e30, warmup_fraction=0.0, max_tokens=20 * 4 * 32)
    settings = replace(settings, schedule="constant", save_every=1, eval_every=100)
    with pytest.raises(TrainingError, match=r"The loss is (nan|inf) at step \d+, micro-batch \d+") as caught:
        uptrain_model(source, output, settings=settings)
    kept = checkpoints.list_checkpoints(output / "checkpoints")[-1]
    assert str(kept) in str(caught.value)
    assert all(torch.isfinite(weight).all() for weight in load_file(kept / "model.safetensors").values())
    assert not (output / "config.json").exists()


def test_weights_that_are_nan_are_never_saved(source, tmp_path, monkeypatch):
    """A gradient can be NaN where the loss is not: the checkpoint before it stays the newest."""
    output = tmp_path / "out"
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def poisoned(parameters, *arguments, **options):
        parameters = list(parameters)
        calls.append(parameters)
        if len(calls) == 4:
            parameters[-1].grad.fill_(math.nan)
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(TrainingError, match=r"weights after step 4 contain NaN .*The last good checkpoint is .*-2'"):
        uptrain_model(source, output, settings=BASE)


def test_full_disk_in_mid_checkpoint(source, tmp_path, monkeypatch):
    """Earlier checkpoints stay whole, nothing half-written stays, and the run can go on."""
    output = tmp_path / "out"
    save, calls = torch.save, []

    def full(content, file, *arguments, **options):
        if str(file).endswith("optimizer.pt"):
            calls.append(file)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        return save(content, file, *arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"step 4 could not be written .*No space left.* continue with --resume"):
        uptrain_model(source, output, settings=BASE)
    assert [entry.name for entry in sorted((output / "checkpoints").iterdir())] == ["checkpoint-2", "run.json"]
    monkeypatch.undo()
    assert uptrain_model(source, output, settings=BASE, resume=True).steps == 6


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


def test_settings_are_strict():
    """A misspelt key names the nearest; a number that YAML reads as text is a number."""
    assert UptrainSettings.from_mapping({"learning_rate": "3e-4"}, "here").learning_rate == 3e-4
    assert UptrainSettings.from_mapping({"lora_learning_rate": "1e-3"}, "here").lora_learning_rate == 1e-3
    assert UptrainSettings.from_mapping({"precision": "bfloat16"}, "here").precision == "bfloat16"
    with pytest.raises(SettingsError, match=r"Unknown key 'learnin_rate' in here\. Did you mean 'learning_rate'"):
        UptrainSettings.from_mapping({"learnin_rate": 1}, "here")
    with pytest.raises(SettingsError, match="learning_rate in here must be a number above 0, got 'fast'"):
        UptrainSettings.from_mapping({"learning_rate": "fast"}, "here")
    with pytest.raises(SettingsError, match="batch_size must be a whole number of at least 1, got 0"):
        UptrainSettings(batch_size=0)
    with pytest.raises(SettingsError, match="warmup_fraction must be a number of at least 0 and at most 1, got 3"):
        UptrainSettings(warmup_fraction=3)
    with pytest.raises(SettingsError, match=r"Unknown teacher_dtype 'bf16'\. Use one of: auto, float32, bfloat16"):
        UptrainSettings(teacher_dtype="bf16")


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


def test_trackers(source, tmp_path):
    """TensorBoard gets the figures that ``metrics.jsonl`` gets; one that is not installed is refused before the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(BASE, report_to=("tensorboard",), eval_every=99, save_every=99, max_tokens=2 * 4 * 32)
    uptrain_model(source, tmp_path / "out", settings=settings)
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    seen = EventAccumulator(str(events))
    seen.Reload()
    tags = set(seen.Tags()["scalars"])
    assert {"train/ce", "train/agreement", "eval/perplexity", "eval/agreement_depth_0"} <= tags
    with pytest.raises(SettingsError, match=r"'wandbb' is unknown or not installed\. Installed: .*tensorboard"):
        uptrain_model(source, tmp_path / "b", settings=replace(BASE, report_to=("wandbb",)))
