"""Compare losses and weights of two sharded processes, killed and resumed, with one process.

    python benchmarks/sharding.py --sharding fsdp2 zero2

FSDP2 has tests that do this. DeepSpeed compiles C++ when it is first used on a CPU, which tests should not, so ZeRO-2
is measured here: ``pip install deepspeed`` (its sdist has no compiled parts) and a C++ compiler are needed. The model
is a tiny Llama with random weights; all runs go through the command line.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.convert.pipeline import convert_model

STEPS, LENGTH, BATCH = 8, 64, 4


def make_model(folder: Path) -> Path:
    """A tiny recursive model with residuals and a tied head; its dense teacher lies beside it."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(open_checkpoint("smollm2-135m"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    settings = {
        "num_prelude_layers": 1,
        "num_coda_layers": 1,
        "initialization": "average",
        "relaxation": "svd",
        "lora_rank": 4,
        "calibration_data": [],
    }
    convert_model(folder / "dense", folder / "recursive", check=False, **settings)
    assert AutoTokenizer.from_pretrained(folder / "recursive") is not None
    return folder / "recursive"


def command(model: Path, output: Path, *, processes: int, sharding: str) -> list[str]:
    """The command line of one run; the batch is the same over all processes together."""
    arguments = ["-m", "recursify", "uptrain", str(model), "-o", str(output), "--sharding", sharding]
    arguments += ["--max-tokens", str(STEPS * LENGTH * BATCH), "--length", str(LENGTH), "--save-every", "2"]
    arguments += ["--batch-size", str(BATCH // processes), "--learning-rate", "1e-3", "--precision", "float32"]
    return [sys.executable, *arguments, *(["--num-processes", str(processes)] if processes > 1 else [])]


def run(arguments: list[str], kill_at: Path | None = None) -> bool:
    """Run to the end, or until ``kill_at`` exists; return whether it was killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while kill_at is not None and process.poll() is None:
        if kill_at.exists():
            os.killpg(process.pid, 9)
            for child in workers(kill_at):
                os.kill(child, 9)
            process.wait()
            return True
        time.sleep(0.005)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-4000:])
    return False


def workers(checkpoint: Path) -> list[int]:
    """Processes of the run that ``checkpoint`` belongs to."""
    output = str(checkpoint.parent.parent).encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if output in arguments and b"uptrain" in arguments:
            found.append(int(folder.name))
    return found


def losses(output: Path) -> dict[int, float]:
    """Loss by step."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def differences(output: Path, reference: Path) -> dict[str, float]:
    """Largest difference between two finished runs."""
    found, expected = losses(output), losses(reference)
    assert found.keys() == expected.keys(), (found, expected)
    weights, others = load_file(output / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == others.keys()
    return {
        "loss_difference": max(abs(found[step] / expected[step] - 1) for step in found),
        "weight_difference": max(float((weights[name] - others[name]).abs().max()) for name in weights),
    }


def installed(package: str) -> str:
    """Version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Train, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharding", nargs="+", default=["fsdp2"], help="[fsdp2]")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sharding.csv"), help="[%(default)s]")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    context = {
        "steps": STEPS,
        **{name: installed(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
        "date": date.today().isoformat(),
        "commit": head.stdout.strip(),
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="recursify-benchmark-") as scratch:
        model = make_model(Path(scratch))
        reference = Path(scratch) / "one"
        run(command(model, reference, processes=1, sharding="none"))
        for sharding in arguments.sharding:
            output = Path(scratch) / sharding
            whole = command(model, output, processes=2, sharding=sharding)
            run(whole)
            rows.append({"sharding": sharding, "killed": False, **differences(output, reference)})
            shutil.rmtree(output)
            killed = run(whole, kill_at=output / "checkpoints" / "checkpoint-4")
            run([*whole, "--resume"] if killed else whole)
            rows.append({"sharding": sharding, "killed": killed, **differences(output, reference)})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *context], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **context} for row in rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
