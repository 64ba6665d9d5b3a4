"""Interrupted conversions: what ``--resume`` writes, and what it refuses."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from safetensors import safe_open

from helpers import processes
from helpers.tiny_models import save_tiny
from recursify.checkpoint.writer import UNFINISHED_FILE
from recursify.convert.pipeline import convert_model
from recursify.errors import CheckpointError, OutputError

SETTINGS = {"sharing": "cycle", "lora_rank": 4, "calibration_tokens": 600, "calibration_length": 50}


def contents(folder):
    """All files of a folder by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def unfinished(folder):
    """The records of interrupted conversions in ``folder``."""
    return list(folder.glob(f".*.recursify-*/{UNFINISHED_FILE}"))


def interrupt_at(stage: str):
    """A callback that interrupts after the first layer of a pass."""

    def progress(name, done, total):
        if name == stage:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a dense model with biases and a tokenizer."""
    folder = tmp_path_factory.mktemp("resume") / "dense"
    save_tiny(folder, "qwen2")
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"num_recursions": 3}, {"sharing": "middle_sequence"}, {"relaxation": "zero"}],
    ids=["cycle", "three", "sequence", "random"],
)
def test_killed_at_ten_moments(dense, tmp_path, options):
    """``kill -9`` while some tensor is written, ten times: the same bytes as a conversion in one go."""
    settings = {**SETTINGS, **options}
    processes.run(tmp_path / "log", dense, tmp_path / "whole", function=processes.convert, **settings)
    moments, output, resumes = random.Random(0), tmp_path / "model", 0
    for _ in range(10):
        resume = bool(unfinished(tmp_path))
        process = processes.start_run(
            tmp_path / "log",
            dense,
            output,
            function=processes.convert,
            die_at_write=moments.randint(25, 60),
            resume=resume,
            **settings,
        )
        process.join()
        resumes += resume
        if process.exitcode == 0:  # nothing was left to write at that moment
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not output.exists()
    else:
        processes.run(tmp_path / "log", dense, output, function=processes.convert, resume=True, **settings)
    assert resumes > 1
    assert contents(output) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("stage", ["share", "correct"])
def test_an_interruption_can_be_resumed(dense, tmp_path, stage, caplog):
    """Ctrl-C keeps the layers so far, and says how to go on; an existing model stays until it is replaced."""
    convert_model(dense, tmp_path / "model", check=False, **SETTINGS)
    whole = contents(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        convert_model(dense, tmp_path / "model", overwrite=True, progress=interrupt_at(stage), **SETTINGS)
    assert "is unfinished. Go on with --resume, or start again without it." in caplog.text
    assert contents(tmp_path / "model") == whole
    convert_model(dense, tmp_path / "model", check=False, overwrite=True, resume=True, **SETTINGS)
    assert contents(tmp_path / "model") == whole
    assert not list(tmp_path.glob(".model*"))


def test_other_settings_are_refused(dense, tmp_path):
    """By name and with both values; the interrupted conversion is still there, and can be abandoned."""
    text = tmp_path / "notes.txt"
    text.write_text("One text. " * 400)
    settings = {**SETTINGS, "calibration_data": (str(text),)}
    with pytest.raises(KeyboardInterrupt):
        convert_model(dense, tmp_path / "model", progress=interrupt_at("share"), **settings)
    with pytest.raises(OutputError, match=r"'lora_rank' was 4 when this conversion started, and is 5 now"):
        convert_model(dense, tmp_path / "model", resume=True, **{**settings, "lora_rank": 5})
    text.write_text("Another text. " * 400)
    with pytest.raises(OutputError, match=r"'text' was '.*' when this conversion started, and is '.*' now"):
        convert_model(dense, tmp_path / "model", resume=True, **settings)
    assert len(unfinished(tmp_path)) == 1
    convert_model(dense, tmp_path / "model", check=False, **settings)
    assert not unfinished(tmp_path)


def test_nothing_to_resume(dense, tmp_path):
    """Neither before the first run nor after a complete one."""
    message = r"has no interrupted conversion to resume: .* Omit --resume to start one"
    with pytest.raises(OutputError, match=message):
        convert_model(dense, tmp_path / "model", resume=True, **SETTINGS)
    convert_model(dense, tmp_path / "model", check=False, **SETTINGS)
    with pytest.raises(OutputError, match=message):
        convert_model(dense, tmp_path / "model", overwrite=True, resume=True, **SETTINGS)


def test_the_record_is_small(dense, tmp_path):
    """Hidden states of two models after one layer, not of every layer."""
    with pytest.raises(KeyboardInterrupt):
        convert_model(dense, tmp_path / "model", progress=interrupt_at("correct"), **SETTINGS)
    with safe_open(unfinished(tmp_path)[0], framework="pt") as file:
        assert set(file.keys()) == {"state.0", "state.1", "generator"}
        assert file.get_tensor("state.1").shape == (12, 50, 32)
        assert file.get_tensor("state.1").dtype == torch.float32


def test_a_damaged_model_is_not_kept(dense, tmp_path):
    """An error that another run would meet again leaves nothing behind."""

    def fail(name, done, total):
        if name == "correct":
            raise CheckpointError("a tensor is damaged")

    with pytest.raises(CheckpointError, match="a tensor is damaged"):
        convert_model(dense, tmp_path / "model", progress=fail, **SETTINGS)
    assert not list(tmp_path.iterdir())
