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
from transformers import TrainerState

from helpers.processes import run, start_run
from helpers.runs import BASE, assert_identical, assert_same, losses, weights
from helpers.tolerances import LOSSES
from recursify.errors import OutputError, SettingsError, TrainingError
from recursify.modeling import RecursiveForCausalLM
from recursify.progress import silent
from recursify.uptrain import checkpoints
from recursify.uptrain.callbacks import Watcher, read_metrics
from recursify.uptrain.run import uptrain_model

pytestmark = pytest.mark.xdist_group("uptraining")


def test_heals(source, plain):
    """Loss falls; the folder is a model with its record, metrics and curves; the source is untouched."""
    output, result = plain
    assert result.steps == 6
    assert result.tokens == 6 * 4 * 32
    assert result.after["perplexity"] < 0.8 * result.before["perplexity"]
    assert result.after["dense_ce"] == result.before["dense_ce"]
    model = RecursiveForCausalLM.from_pretrained(output)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    run_record = json.loads((output / "recursify.json").read_text())["history"][-1]
    assert run_record["tokens"] == result.tokens
    assert run_record["after"] == result.after
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
    lines, others = (read_metrics(output / "metrics.jsonl") for output in (tmp_path / "out", plain[0]))
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
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
        assert_identical(output, tmp_path / "whole")


def test_killed_while_metrics_are_rewritten(source, plain, tmp_path, monkeypatch):
    """A resumed run drops lines after its checkpoint; killed in the middle of that, it still has the lines before."""
    output, logged = tmp_path, losses(plain[0])
    shutil.copy(plain[0] / "metrics.jsonl", output)

    class Killed(BaseException):
        pass

    def write_half(file, text, **options):
        with open(file, "w", **options) as stream:
            stream.write(text[: len(text) // 2])
        raise Killed

    monkeypatch.setattr(type(output), "write_text", write_half)
    with pytest.raises(Killed):
        Watcher(output, 128, silent).on_train_begin(None, TrainerState(global_step=4), None)
    assert losses(output) == logged


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
