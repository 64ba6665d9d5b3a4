"""Speed and memory of healing, beside transformers' plain Trainer on the dense model of the same effective depth.

    python benchmarks/uptrain_speed.py

SmolLM2-135M (30 layers) is trained by the plain Trainer with its own cross-entropy; the recursive models made from it
(prelude 4, 11 layers applied twice, coda 4) by ``recursify``'s stage ``heal``, without distillation, with it, and
without residuals. All take the same packed batches, optimizer and schedule. Each measurement is a fresh process that
takes a few steps to warm up and gives the median seconds of the others; the cases take turns, round by round, and their
median over the rounds is kept. Peak memory is that of the measured steps (``VmHWM``, reset after the warm-up), so what
loading a model costs is left out.

The same ratio is given by CPU seconds, which other processes of the machine disturb less. Speed does not depend on what
the weights are, so the conversions here do without text.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

DENSE = "smollm2-135m"
CONVERSION = {
    "num_prelude_layers": 4,
    "num_coda_layers": 4,
    "initialization": "average",
    "relaxation": "svd",
    "calibration_data": [],
}
RANK = 64
MB = 10**6
AIM = 0.9
"""Tokens per second of healing without distillation, over those of the plain Trainer on the dense model."""


@dataclass(frozen=True)
class Case:
    """Training case: trainer, residual rank (None for the dense model), weight of distillation."""

    name: str
    rank: int | None
    kl_weight: float = 0.0


CASES = (
    Case("dense, plain Trainer", None),
    Case(f"heal, rank {RANK}", RANK),
    Case(f"heal, rank {RANK}, distillation", RANK, 1.0),
    Case("heal, rank 0", 0),
)


@dataclass
class Row:
    """Medians over the rounds of one case in one precision."""

    case: str
    precision: str
    rounds: int
    tokens_per_second: float
    slowest: float
    fastest: float
    speed_ratio_to_dense: float
    cpu_ratio_to_dense: float
    peak_rss_mb: float
    memory_ratio_to_dense: float
    parameters: int
    aim: str = ""


def train(specification: dict[str, Any]) -> dict[str, float]:
    """Train in this process; return median seconds per step, peak resident bytes, parameters."""
    import torch
    from transformers import Trainer, TrainerCallback
    from transformers.utils import logging

    from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
    from recursify.modeling import RecursiveForCausalLM
    from recursify.uptrain.arguments import training_arguments
    from recursify.uptrain.data import Collator, prepare_data
    from recursify.uptrain.heal import Heal
    from recursify.uptrain.settings import UptrainSettings
    from recursify.uptrain.trainer import RecursiveTrainer

    logging.disable_progress_bar()
    folder, warm_up = specification["folder"], specification["warm_up"]
    settings = UptrainSettings(
        length=specification["length"],
        batch_size=specification["batch_size"],
        max_tokens=specification["length"] * specification["batch_size"] * specification["steps"],
        kl_weight=specification["kl_weight"],
        precision=specification["precision"],
        eval_every=10**9,
        save_every=10**9,
        trainer={} if folder else {"bf16": specification["precision"] == "bfloat16"},
    )

    class Clock(TrainerCallback):
        """Callback that records the end of every step."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.cpu_times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())
            self.cpu_times.append(time.process_time())
            if len(self.times) == warm_up:
                Path("/proc/self/clear_refs").write_text("5")

    clock = Clock()
    checkpoint = open_checkpoint(DENSE)
    tokenizer = load_tokenizer(checkpoint)
    data = prepare_data(settings, tokenizer, checkpoint.config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        # As for a run that is resumed: nothing is measured on held-out text before the first step.
        arguments = training_arguments(settings, Path(scratch), world_size=1, resumes=True)
        model: Any
        trainer: Trainer
        if folder is None:
            model = checkpoint.load_model(torch.float32)
            arguments.eval_strategy = arguments.save_strategy = "no"
            trainer = Trainer(
                model=model,
                args=arguments,
                data_collator=Collator(settings.length, tokenizer.pad_token_id or 0),
                train_dataset=data.train,
                callbacks=[clock],
            )
        else:
            model = RecursiveForCausalLM.from_pretrained(folder, dtype=torch.float32)
            teacher = checkpoint.load_model().requires_grad_(False) if settings.kl_weight else None
            trainer = RecursiveTrainer(model, Heal(settings, teacher), data, arguments, tokenizer, [clock])
            arguments.eval_strategy = arguments.save_strategy = "no"
        trainer.train()

    def median_step(times: list[float]) -> float:
        return statistics.median(after - before for before, after in pairwise(times[warm_up - 1 :]))

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "seconds": median_step(clock.times),
        "cpu_seconds": median_step(clock.cpu_times),
        "peak_rss": int(status["VmHWM"].split()[0]) * 1024,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def measure(case: Case, precision: str, folders: dict[int, Path], arguments: argparse.Namespace) -> dict[str, float]:
    """Train once, in a fresh process."""
    specification = {
        "folder": None if case.rank is None else str(folders[case.rank]),
        "kl_weight": case.kl_weight,
        "precision": precision,
        **{name: getattr(arguments, name) for name in ("length", "batch_size", "steps", "warm_up")},
    }
    command = [sys.executable, __file__, "--child", json.dumps(specification)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summarize(runs: dict[tuple[str, str], list[dict[str, float]]], tokens_per_step: int) -> list[Row]:
    """Medians, set against the dense model's in the same precision and, for speed, the same round."""
    rows = []
    for (name, precision), mine in runs.items():
        dense = runs[(CASES[0].name, precision)]
        speeds = [tokens_per_step / run["seconds"] for run in mine]
        peak = statistics.median(run["peak_rss"] for run in mine)
        row = Row(
            case=name,
            precision=precision,
            rounds=len(mine),
            tokens_per_second=statistics.median(speeds),
            slowest=min(speeds),
            fastest=max(speeds),
            speed_ratio_to_dense=statistics.median(
                theirs["seconds"] / run["seconds"] for run, theirs in zip(mine, dense, strict=True)
            ),
            cpu_ratio_to_dense=statistics.median(
                theirs["cpu_seconds"] / run["cpu_seconds"] for run, theirs in zip(mine, dense, strict=True)
            ),
            peak_rss_mb=peak / MB,
            memory_ratio_to_dense=peak / statistics.median(run["peak_rss"] for run in dense),
            parameters=int(mine[0]["parameters"]),
        )
        if name == CASES[1].name:
            fast, small = row.speed_ratio_to_dense >= AIM, row.memory_ratio_to_dense < 1
            row.aim = f"speed >= {AIM} x dense: {'met' if fast else 'missed'}; memory < dense: " + (
                "met" if small else "missed"
            )
        rows.append(row)
    return rows


def about(arguments: argparse.Namespace) -> dict[str, str | int]:
    """Settings and versions, the same in every row."""
    from importlib.metadata import version

    here = Path(__file__).resolve().parent
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(["git", "-C", str(here), "diff", "--quiet", "HEAD", "--", "../src"])
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
    return {
        "length": arguments.length,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "warm_up": arguments.warm_up,
        "threads": arguments.threads,
        **{name: version(name) for name in ("recursify", "torch", "transformers", "accelerate")},
        "cpu": names[0] if names else "",
        "cpus": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(),
        "commit": head.stdout.strip() + ("+changes" if head.returncode == 0 and changed.returncode == 1 else ""),
    }


def write_csv(rows: list[Row], context: dict[str, str | int], file: Path) -> None:
    """One line per case and precision."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*asdict(rows[0]), *context], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            figures = {
                key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(row).items()
            }
            writer.writerow({**figures, **context})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per case and precision [%(default)s]")
    parser.add_argument("--steps", type=int, default=8, help="per process [%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, help="of them not measured [%(default)s]")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step [%(default)s]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[%(default)s]")
    parser.add_argument("--precisions", default="float32,bfloat16", help="[%(default)s]")
    parser.add_argument("--cases", help="numbers of cases to run beside the dense one, for a trial: 1,3 [all]")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/uptrain_speed.csv"), help="[%(default)s]"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.warm_up < arguments.steps:
        parser.error("--warm-up must be at least 1 and below --steps")
    return arguments


def main() -> None:
    """Convert, measure, report."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(train(json.loads(arguments.child))))
        return
    from recursify.convert.pipeline import convert_model

    context = about(arguments)
    cases = CASES if arguments.cases is None else (CASES[0], *(CASES[int(n)] for n in arguments.cases.split(",")))
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="recursify-benchmark-") as scratch:
        folders = {}
        for rank in {case.rank for case in cases if case.rank is not None}:
            folders[rank] = Path(scratch) / f"rank-{rank}"
            convert_model(DENSE, folders[rank], check=False, **{**CONVERSION, "lora_rank": rank})
        for number in range(arguments.rounds):
            for precision in arguments.precisions.split(","):
                for case in cases:
                    run = measure(case, precision, folders, arguments)
                    runs.setdefault((case.name, precision), []).append(run)
                    speed = arguments.length * arguments.batch_size / run["seconds"]
                    print(
                        f"{number + 1}: {precision}, {case.name}: {speed:.1f} tokens/s, {run['peak_rss'] / MB:,.0f} MB",
                        flush=True,
                    )
    rows = summarize(runs, arguments.length * arguments.batch_size)
    write_csv(rows, context, arguments.output)
    print("\n| case | precision | tokens/s | ÷ dense | by CPU time | peak MB | ÷ dense |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.case} | {row.precision} | {row.tokens_per_second:.1f} | {row.speed_ratio_to_dense:.2f} | "
            f"{row.cpu_ratio_to_dense:.2f} | "
            f"{row.peak_rss_mb:,.0f} | {row.memory_ratio_to_dense:.2f} |"
        )
    print("\n".join(["", *(f"{row.precision}: {row.aim}" for row in rows if row.aim)]))


if __name__ == "__main__":
    main()
