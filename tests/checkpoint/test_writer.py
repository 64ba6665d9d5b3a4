"""Shards are written in any order, and a folder is there whole or not at all."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import save_tiny
from recursify.checkpoint import writer
from recursify.checkpoint.shards import INDEX_FILE, TensorInfo, folder_tensors
from recursify.checkpoint.writer import ShardedCheckpoint, atomic_folder, check_target
from recursify.errors import OutputError


def tensors(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 3), "d": (1,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 64])
def test_any_order_reads_back(tmp_path, dtype, max_shard_bytes):
    """safetensors' own reader finds what was written, in one shard or several."""
    values = tensors(dtype)
    infos = {name: TensorInfo(tuple(value.shape), dtype) for name, value in values.items()}
    output = ShardedCheckpoint(tmp_path, infos, max_shard_bytes=max_shard_bytes)
    for name in random.Random(0).sample(sorted(values), len(values)):
        output.write(name, values[name])
        assert torch.equal(output.read(name), values[name])
    output.write("a", values["a"] + 1)
    output.finish()
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found.update(load_file(file))
    assert torch.equal(found.pop("a"), values.pop("a") + 1)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert (tmp_path / INDEX_FILE).exists() is (max_shard_bytes == 64)
    assert folder_tensors(tmp_path) == infos


def test_a_tensor_that_was_forgotten_is_caught(tmp_path):
    """Zeros that nobody wrote do not become weights."""
    output = ShardedCheckpoint(tmp_path, {"a": TensorInfo((2,), torch.float32)})
    with pytest.raises(AssertionError, match=r"never written: \['a'\]"):
        output.finish()


def test_rows_are_written_one_by_one(tmp_path):
    """In any order; a tensor with a row that nobody wrote is caught."""
    values = torch.arange(24, dtype=torch.float32).reshape(3, 2, 4)
    output = ShardedCheckpoint(
        tmp_path, {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((3, 2, 4), torch.float16)}
    )
    output.write("a", torch.ones(2))
    for index in (2, 0):
        output.write_row("b", index, values[index])
    with pytest.raises(AssertionError, match=r"never written: \['b\[1\]'\]"):
        output.finish()
    output.write_row("b", 1, values[1])
    output.finish()
    assert torch.equal(output.read("b"), values.half())


def test_failure_leaves_nothing(tmp_path):
    """Neither the target nor the scratch folder."""

    def fail():
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("dies")

    with pytest.raises(RuntimeError, match="dies"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_model(tmp_path):
    """The old model is there until the new one is whole."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("x")

    def fail():
        with atomic_folder(tmp_path / "model", overwrite=True):
            raise RuntimeError("dies")

    with pytest.raises(RuntimeError, match="dies"):
        fail()
    assert (tmp_path / "model" / "old").exists()
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_model_moved_aside_by_a_dead_run_is_put_back(tmp_path):
    """If a run died between moving the old model away and the new one in."""
    aside = tmp_path / ".model.replaced-999999"
    aside.mkdir()
    (aside / "old").write_text("x")
    writer._recover(tmp_path / "model")
    assert (tmp_path / "model" / "old").exists()


def test_existing_target(tmp_path):
    """Needs ``--overwrite``."""
    (tmp_path / "model").mkdir()
    with pytest.raises(OutputError, match=r"model' exists. Choose another -o, or pass --overwrite"):
        check_target(tmp_path / "model", None, overwrite=False, num_bytes=0)
    check_target(tmp_path / "model", None, overwrite=True, num_bytes=0)


@pytest.mark.parametrize("target", ["source/inner", "source", "source/a/b", "."])
def test_target_inside_or_around_the_source(tmp_path, target):
    """Would destroy the input, or be listed in it."""
    (tmp_path / "source").mkdir()
    with pytest.raises(OutputError, match="overlap"):
        check_target(tmp_path / target, tmp_path / "source", overwrite=True, num_bytes=0)


def test_no_room(tmp_path, monkeypatch):
    """Known before the work, with both figures."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(OutputError, match=r"has 0.10 GB free, but the model needs 2.00 GB"):
        check_target(tmp_path / "model", None, overwrite=False, num_bytes=2 * 10**9)


def test_target_that_is_a_file(tmp_path):
    """Not replaced by a folder."""
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OutputError, match="is a file, but a model is a folder"):
        check_target(tmp_path / "model", None, overwrite=True, num_bytes=0)


CONVERT = """
import sys
from recursify.checkpoint import writer
from recursify.convert.pipeline import convert_model
write = writer.ShardedCheckpoint.write
def slowly(self, name, tensor):
    import time
    time.sleep(0.01)
    write(self, name, tensor)
writer.ShardedCheckpoint.write = slowly
print("ready", flush=True)
convert_model(sys.argv[1], sys.argv[2], check=False, overwrite=True, calibration_data=[])
"""


def test_killed_ten_times_at_random_moments(tmp_path):
    """``kill -9``: the target never exists half-made, and the next run succeeds."""
    save_tiny(tmp_path / "dense")
    target = tmp_path / "out" / "model"
    moments = random.Random(time.time_ns())
    script = [sys.executable, "-c", CONVERT, str(tmp_path / "dense"), str(target)]
    killed = 0
    for _ in range(10):
        run = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
        run.stdout.readline()
        time.sleep(moments.uniform(0.0, 1.2))
        killed += run.poll() is None
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        if target.exists():  # it had finished: then it is whole
            assert (target / "recursify.json").exists()
            assert folder_tensors(target)
    assert killed > 0
    subprocess.run(script, check=True, capture_output=True)
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]
    assert (target / "recursify.json").exists()
