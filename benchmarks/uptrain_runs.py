"""Shared code of uptraining benchmarks: cases that differ in a few settings, run one after the other.

All cases of a table start from one converted folder and see the same tokens in the same order; perplexity is that of
the held-out sequences, which are the same, too. Rows are written as they are done and merged by name into the output,
so a table can be continued with ``--cases name,name``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from convert import commit, versions
from recursify.checkpoint.shards import folder_tensors
from recursify.evaluation.text import default_text
from recursify.uptrain import checkpoints
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

MB = 10**6


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: Name for ``--cases``.
        settings: Settings that differ from the other cases.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def at_rates(name: str, rates: Sequence[float], **settings: Any) -> list[Case]:
    """The same case at several learning rates, of shared weights and residuals alike."""
    return [Case(f"{name} at {rate:g}", {**settings, "learning_rate": rate}) for rate in rates]


def measure(case: Case, model: Path, base: UptrainSettings) -> dict[str, Any]:
    """Run ``case`` and return its figures; the optimizer's bytes are those of its state in the last checkpoint."""
    settings = replace(base, **case.settings)
    with tempfile.TemporaryDirectory(prefix="recursify-benchmark-") as scratch:
        start = time.perf_counter()
        result = uptrain_model(model, Path(scratch) / "out", settings=settings)
        seconds = time.perf_counter() - start
        last = checkpoints.list_checkpoints(Path(scratch) / "out" / checkpoints.FOLDER)[-1]
        trained = sum(info.num_parameters for info in folder_tensors(last).values())
        state = torch.load(last / "optimizer.pt", mmap=True, weights_only=True)["state"]
        num_bytes = sum(v.nbytes for entry in state.values() for v in entry.values() if isinstance(v, torch.Tensor))
    return {
        "case": case.name,
        "stage": settings.stage,
        "optimizer": settings.optimizer,
        "learning_rate": settings.learning_rate,
        "tie_fraction": settings.tie_fraction if settings.stage == "tie" else "",
        "tie_noise": settings.tie_noise if settings.stage == "tie" else "",
        "trained_parameters": trained,
        "optimizer_mb": round(num_bytes / MB, 3),
        "optimizer_bytes_per_parameter": round(num_bytes / trained, 4),
        "perplexity_before": f"{result.before['perplexity']:.6g}",
        "perplexity": f"{result.after['perplexity']:.6g}",
        "kl": round(result.after["kl"], 4),
        "agreement": round(result.after["agreement"], 4),
        "dense_perplexity": f"{math.exp(result.after['dense_ce']):.6g}",
        "tokens": result.tokens,
        "steps": result.steps,
        "seconds": round(seconds, 1),
    }


def write_held_out(folder: Path, characters: int) -> str:
    """Write ``characters`` of the help topics that uptraining does not train on into a file."""
    file = folder / "held_out.txt"
    file.write_text("\n\n".join(default_text("held_out").documents)[:characters], encoding="utf-8")
    return str(file)


def context(model: Path, settings: UptrainSettings, held_out: str) -> dict[str, Any]:
    """Settings and versions, the same in every row."""
    return {
        "model": model.name,
        "teacher": settings.teacher or "",
        "data": " ".join(settings.data or ("pydoc_data.topics",)),
        "held_out": held_out,
        "length": settings.length,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        **versions(sys.executable, ["recursify", "torch", "transformers", "trl"]),
        "python": ".".join(map(str, sys.version_info[:3])),
        "cpus": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def write_rows(rows: list[dict[str, Any]], file: Path, order: list[str]) -> None:
    """Merge ``rows`` by name into the CSV, in the order of the table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    merged: dict[str, dict[str, Any]] = {}
    if file.exists():
        with open(file, newline="", encoding="utf-8") as stream:
            merged = {row["case"]: row for row in csv.DictReader(stream)}
    merged |= {row["case"]: row for row in rows}
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(merged[name] for name in sorted(merged, key=lambda n: order.index(n) if n in order else -1))


def main(description: str, cases: list[Case], output: Path) -> None:
    """The command line of a table of ``cases``."""
    names = [case.name for case in cases]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that `recursify convert` wrote")
    parser.add_argument("--cases", default="all", help=f"all, or some of: {', '.join(names)} [%(default)s]")
    parser.add_argument("--data", action="append", help="as `recursify uptrain --data` (repeatable)")
    parser.add_argument("--eval-data", action="append", help="held-out text (repeatable)")
    parser.add_argument(
        "--eval-characters", type=int, default=32_000, help="of Python's help topics, without --eval-data [%(default)s]"
    )
    parser.add_argument("--tokens", type=int, default=15_360, help="to train on [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per step [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=output, help="[%(default)s]")
    arguments = parser.parse_args()
    chosen = names if arguments.cases == "all" else [name.strip() for name in arguments.cases.split(",")]
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"unknown cases: {', '.join(unknown)}")
    logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="recursify-benchmark-") as scratch:
        held_out = arguments.eval_data or [write_held_out(Path(scratch), arguments.eval_characters)]
        base = UptrainSettings(
            data=tuple(arguments.data) if arguments.data else None,
            eval_data=tuple(held_out),
            max_tokens=arguments.tokens,
            length=arguments.length,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            # Measured before and after only, and saved once, for the size of the optimizer's state.
            eval_every=10**9,
            save_every=math.ceil(arguments.tokens / (arguments.length * arguments.batch_size)),
        )
        where = " ".join(arguments.eval_data or [f"pydoc_data.topics, {arguments.eval_characters} characters"])
        about = context(arguments.model, base, where)  # before, so that a commit made meanwhile is not taken for it
        for case in cases:
            if case.name not in chosen:
                continue
            row = {**measure(case, arguments.model, base), **about}
            write_rows([row], arguments.output, names)
            print(
                f"{case.name}: perplexity {row['perplexity_before']} -> {row['perplexity']} (dense "
                f"{row['dense_perplexity']}), KL {row['kl']}, optimizer {row['optimizer_mb']} MB, {row['seconds']} s",
                flush=True,
            )
