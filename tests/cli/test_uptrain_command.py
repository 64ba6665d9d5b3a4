"""``recursify uptrain`` as a user types it: one process, several, and one that dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_commands import run

from helpers.tiny_models import convert_tiny, save_tiny
from recursify.uptrain.callbacks import read_metrics

pytestmark = pytest.mark.xdist_group("uptraining")

SHORT = ["--length", 32, "--batch-size", 2, "--max-tokens", 6 * 4 * 32, "--learning-rate", "5e-3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A recursive model with its dense teacher beside it."""
    folder = tmp_path_factory.mktemp("uptrain-cli")
    save_tiny(folder / "dense")
    convert_tiny(folder / "dense", folder / "recursive", lora_rank=4)
    return folder / "recursive"


def start(*arguments: object, launcher: tuple[object, ...] = ()) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, launcher), "-m", "recursify", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_chats(model, tmp_path, capsys):
    """A JSONL of chats, one command: the template is the model's, and only answers are learnt."""
    shutil.copytree(model, tmp_path / "model")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it is."}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    data = ["--data", tmp_path / "chats.jsonl", "--completions-only", "--length", 64, *SHORT[2:]]
    assert run("uptrain", tmp_path / "model", "-o", tmp_path / "out", *data, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["after"]["ce"] < facts["before"]["ce"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


def test_a_stream_with_a_damaged_line(model, tmp_path, capsys, monkeypatch):
    """The first steps run; then the line is one error with its number, and no model is written."""
    monkeypatch.setattr("recursify.uptrain.data.SHUFFLE_BUFFER", 100)
    rows = [json.dumps({"text": f"row {index:05}"}) for index in range(1200)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"text": "no end']), encoding="utf-8")
    (tmp_path / "held_out.txt").write_text("words " * 50, encoding="utf-8")
    data = ["--data", tmp_path / "rows.jsonl", "--eval-data", tmp_path / "held_out.txt", "--streaming"]
    size = ["--length", 256, "--batch-size", 4, "--max-tokens", 10**6, "--kl-weight", 0]
    assert run("uptrain", model, "-o", tmp_path / "out", *data, *size) == 1
    err = capsys.readouterr().err
    assert "rows.jsonl:1201 is not JSON (column 10: Unterminated string starting at)" in err
    assert "Traceback" not in err
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] > 3
    assert not (tmp_path / "out" / "config.json").exists()


def test_markdown(model, tmp_path, capsys):
    """A folder of Markdown files, one command; the table has the dense model beside."""
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for index in range(8):
        (tmp_path / "notes" / "deep" / f"{index}.md").write_text(f"# Note {index}\n\n" + "Some words. " * 20)
    assert run("uptrain", model, "-o", tmp_path / "out", "--data", tmp_path / "notes", *SHORT) == 0
    out = capsys.readouterr().out
    assert "wrote" in out
    assert [line.split()[0] for line in out.splitlines() if line[:6] in ("before", "after ", "dense ")] == [
        "before",
        "after",
        "dense",
    ]
    assert run("inspect", tmp_path / "out", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) == 1


def test_two_processes(model, tmp_path):
    """``--num-processes 2``, sharded: one model, one JSON document on stdout."""
    sharded = ["--num-processes", 2, "--sharding", "fsdp2", "--precision", "bfloat16"]
    process = start("uptrain", model, "-o", tmp_path / "out", *SHORT, *sharded, "--json")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    facts = json.loads(out)
    assert facts["steps"] == 6
    assert facts["tokens"] == 6 * 2 * 2 * 32
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_accelerate_launch(model, tmp_path):
    """``accelerate launch -m recursify uptrain`` trains."""
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1)
    process = start("uptrain", model, "-o", tmp_path / "out", *SHORT, "--json", launcher=launcher)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 12


def test_a_rank_that_dies_is_named(model, tmp_path):
    """``kill -9`` of rank 1: the others end, the exit code is 1 and the message names it."""
    arguments = [*SHORT[:4], "--max-tokens", 10**7, "--num-processes", 2]
    process = start("uptrain", model, "-o", tmp_path / "out", *arguments)
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "out" / "metrics.jsonl"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Rank 1 of 2 ended with exit code -9, and the others were terminated" in err


def worker(parent: int, rank: int) -> int:
    """The process id of the worker of ``rank`` below ``parent``."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no worker of rank {rank} among {children}")


def test_wrong_input(model, tmp_path, capsys):
    """One clear line each, exit code 1, and no model written."""
    for arguments, message in (
        ([*SHORT, "--data", tmp_path / "nowhere.txt"], "no text at"),
        ([*SHORT, "--stage", "heel"], "Unknown stage 'heel'"),
        (["--length", 100_000], "longer than the model's context"),
        ([*SHORT, "--data", model / "config.json"], "has the fields"),
    ):
        assert run("uptrain", model, "-o", tmp_path / "out", *arguments) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "config.json").exists()
    assert run("uptrain", model.parent / "dense", "-o", tmp_path / "out") == 1
    assert "is not a recursive model" in capsys.readouterr().err
