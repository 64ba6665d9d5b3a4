"""``recursify eval``: the figures of lm-eval's own backend, at every depth, beside the dense control."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers.command_line import run
from helpers.tiny_models import save_tiny
from recursify.checkpoint.record import read_record
from recursify.modeling import RecursiveForCausalLM

SAMPLES = 24
METRICS = ("acc", "acc_norm", "brier_score")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A dense model, the recursive one made from it, with exits, and its unrolled export; and a task."""
    home = tmp_path_factory.mktemp("tasks")
    save_tiny(home / "dense")
    convert = ("convert", home / "dense", "-o", home / "plain", "--lora-rank", 4, "--calibration-data", "none")
    assert run(*convert, "--no-check") == 0
    model = RecursiveForCausalLM.from_pretrained(home / "plain")
    torch.manual_seed(0)
    model.add_exit_heads("norm")
    with torch.no_grad():
        model.exit_heads[0].norm.weight.mul_(torch.rand(32) + 0.5)
    for file in (home / "plain").iterdir():
        target = home / "recursive" / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    model.save_pretrained(home / "recursive")
    assert run("export", home / "recursive", "-o", home / "unrolled", "--format", "dense", "--no-check") == 0
    write_task(home / "tasks")
    return home


def write_task(folder: Path) -> None:
    """Multiple choice over a few random words; a random model has opinions about it."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["red", "green", "blue", "grey", "black"]
    rows = [
        {"question": f"{draw.choice(words)} {draw.choice(words)}", "choices": draw.sample(words, 3), "answer": n % 3}
        for n in range(SAMPLES)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "tiny_mc",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": metric} for metric in METRICS],
    }
    (folder / "tiny_mc.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


PLAIN_BACKEND = """
import json, sys
sys.modules["recursify"] = None
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
for arguments in sys.argv[2:]:
    more = {"tasks": ["tiny_mc"], "task_manager": manager, "device": "cpu", "bootstrap_iters": 0}
    results = simple_evaluate(model="hf", model_args=f"{arguments},trust_remote_code=True", **more)
    print("RESULTS", json.dumps(results["results"]["tiny_mc"], default=str))
"""


def plain_backend(models: Path, home: Path, *arguments: str) -> list[dict[str, float]]:
    """What lm-eval's own ``--model hf --model_args …`` says, in a process without recursify."""
    command = [sys.executable, "-c", PLAIN_BACKEND, str(models / "tasks"), *arguments]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    return [{metric: figures[f"{metric},none"] for metric in METRICS} for figures in found]


def by_metric(entries: list[dict], depth: int | None, field: str = "value") -> dict[str, float]:
    return {entry["metric"]: entry[field] for entry in entries if entry["depth"] == depth}


def test_figures_are_those_of_the_plain_backend(models, capsys, tmp_path):
    """At full depth also those of the unrolled export; at depth 0 by a config value; the control those of the dense."""
    folder = models / "recursive"
    evaluate = ("eval", folder, "--tasks", "tiny_mc", "--include-path", models / "tasks")
    assert run(*evaluate, "--depth", 0, "--depth", "all", "--json") == 0
    entries = json.loads(capsys.readouterr().out)["evaluation"]
    full, shallow, control = by_metric(entries, None), by_metric(entries, 0), by_metric(entries, None, "dense_value")
    folders = [f"pretrained={models / name}" for name in ("recursive", "unrolled", "recursive", "dense")]
    folders[2] += ",exit_depth=0"
    mine, unrolled, at_depth_0, dense = plain_backend(models, tmp_path, *folders)
    # Batches of other sizes: a Brier score is a mean of floats, an accuracy is a count.
    assert full == pytest.approx(mine, abs=1e-6)
    assert full == pytest.approx(unrolled, abs=1e-6)
    assert shallow == pytest.approx(at_depth_0, abs=1e-6)
    assert control == pytest.approx(dense, abs=1e-6)
    assert abs(shallow["brier_score"] - full["brier_score"]) > 1e-3, "or the test could not tell depths apart"
    assert all(entry["num_samples"] == SAMPLES for entry in entries)
    assert all(entry["stderr"] > 0 for entry in entries if entry["metric"] == "acc")
    assert read_record(folder)["evaluation"] == entries

    assert run(*evaluate, "--limit", 5, "--no-control") == 0
    out = capsys.readouterr().out
    assert "full depth" in out
    assert "–" in out
    recorded = read_record(folder)["evaluation"]
    assert len(recorded) == 2 * len(METRICS), "newer figures take the place of older ones, and depths are kept apart"
    assert {entry["depth"]: entry["limit"] for entry in recorded} == {0: None, None: 5}


def test_full_depth_is_full_depth_whatever_the_config_says(models, capsys, tmp_path):
    """A model set to exit after its first recursion is scored at all of them, and left as it was."""
    evaluate = ("--tasks", "tiny_mc", "--include-path", models / "tasks", "--no-control", "--json", "--limit", 6)
    assert run("eval", models / "plain", *evaluate, "--no-save") == 0
    wanted = by_metric(json.loads(capsys.readouterr().out)["evaluation"], None)
    model = RecursiveForCausalLM.from_pretrained(models / "plain", exit_depth=0)
    for file in (models / "plain").iterdir():
        target = tmp_path / "shallow" / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path / "shallow")
    assert run("eval", tmp_path / "shallow", *evaluate) == 0
    assert by_metric(json.loads(capsys.readouterr().out)["evaluation"], None) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "no_such_task"), "lm-eval has no task 'no_such_task'"),
        (("--tasks", "tiny_mc", "--depth", "7"), "has exits after depths 0, so none at --depth 7"),
        (("--tasks", "tiny_mc", "--include-path", "nowhere"), "--include-path 'nowhere' is not a folder"),
    ],
)
def test_what_cannot_be_scored_is_refused(models, capsys, arguments, message):
    """One line each, and nothing recorded."""
    include = () if "--include-path" in arguments else ("--include-path", models / "tasks")
    before = read_record(models / "plain")
    assert run("eval", models / "plain", *arguments, *include) == 1
    assert message in capsys.readouterr().err
    assert read_record(models / "plain") == before


def test_a_task_without_its_data_is_refused(models, capsys, tmp_path):
    """As offline, when the data set was never fetched."""
    task = yaml.safe_load((models / "tasks" / "tiny_mc.yaml").read_text(encoding="utf-8"))
    task |= {"task": "absent", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "absent.jsonl")}}}
    (tmp_path / "absent.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    assert run("eval", models / "plain", "--tasks", "absent", "--include-path", tmp_path, "--no-control") == 1
    assert "The tasks absent could not be run" in capsys.readouterr().err


def test_without_lm_eval_it_says_what_to_install(models, capsys, monkeypatch):
    """It is an extra."""
    from recursify.evaluation import tasks

    def missing(name: str) -> str:
        raise tasks.PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "version", missing)
    assert run("eval", models / "plain", "--tasks", "tiny_mc") == 1
    assert "pip install 'recursify[eval]'" in capsys.readouterr().err
