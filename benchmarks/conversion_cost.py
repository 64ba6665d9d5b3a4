"""Time and memory of the calibrated conversion: SmolLM2-135M beside another checkout, and an 8B shape.

::

    git worktree add ../before 39a0e3c
    python benchmarks/conversion_cost.py smollm2 --baseline ../before
    python benchmarks/conversion_cost.py shape

Whole processes are measured, without the check at the end. ``smollm2`` converts with each checkout's default settings,
two recursions and three, rank 64 and 128, one thread and two; the checkouts take turns, and both results are evaluated
by this one on the same held-out text. ``shape`` writes random Llama layers of the 8B shape (hidden size 4,096, MLP
14,336, 8 of 32 heads for keys), converts models of one and of two tied groups, and extrapolates by their difference to
32 layers; beside that stands what the plan of the 32-layer model predicts (of which only headers are written).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keyed_results import Figures, KeyedResults, markdown_table, short
from measured_process import convert
from random_checkpoint import Shape, write_checkpoint, write_headers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = "smollm2-135m"
LAYOUTS: dict[int, dict[str, Any]] = {
    2: {"num_recursions": 2, "num_prelude_layers": 4, "num_coda_layers": 4},
    3: {"num_recursions": 3, "sharing": "cycle"},
}
RANKS = (64, 128)
THREADS = (1, 2)
COLUMNS = [
    "recursions",
    "rank",
    "threads",
    "checkout",
    "tokens",
    "cpu_seconds",
    "wall_seconds",
    "peak_mb",
    "perplexity",
    "date",
]

EVALUATE = """
import sys, recursify
print(recursify.evaluate_model(sys.argv[1], length=512, max_tokens=int(sys.argv[2])).perplexity)
"""

SHAPE_8B = Shape(hidden=4096, intermediate=14336, heads=32, key_heads=8, vocabulary=128256)
NUM_LAYERS = 32
ENDS = {"num_prelude_layers": 1, "num_coda_layers": 1, "num_recursions": 2, "lora_rank": 64}


def commit(checkout: Path) -> str:
    """Short commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def evaluate(folder: Path, num_tokens: int) -> float:
    """Held-out perplexity of a converted model, in a process of its own."""
    command = [sys.executable, "-c", EVALUATE, str(folder), str(num_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(checkout: Path, recursions: int, rank: int, threads: int, arguments: argparse.Namespace) -> Figures:
    """Convert once with the code of a checkout, and evaluate the result."""
    settings = {**LAYOUTS[recursions], "lora_rank": rank}
    if arguments.tokens is not None:
        settings["calibration_tokens"] = arguments.tokens
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        cost, stages = convert(MODEL, folder, settings, threads=threads, source=checkout)
        tokens = json.loads((folder / "recursify.json").read_text(encoding="utf-8"))["calibration"]["num_tokens"]
        perplexity = evaluate(folder, arguments.evaluation_tokens)
    print({name: round(figures["cpu_seconds"], 1) for name, figures in stages.items()}, file=sys.stderr)
    return {
        "recursions": recursions,
        "rank": rank,
        "threads": threads,
        "checkout": commit(checkout),
        "tokens": tokens,
        "cpu_seconds": round(cost.cpu_seconds, 1),
        "wall_seconds": round(cost.wall_seconds, 1),
        "peak_mb": round(cost.peak_bytes / 1e6),
        "perplexity": f"{perplexity:.6g}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def key_of(row: Figures) -> tuple[int, int, int, str]:
    """Place of a row in the results."""
    return int(row["recursions"]), int(row["rank"]), int(row["threads"]), row["checkout"]


def report(rows: dict[Any, Figures]) -> str:
    """The table in Markdown."""
    head = ["recursions, rank", "threads", "commit", "tokens", "CPU s", "wall s", "peak MB", "perplexity"]
    lines = [
        [
            f"{row['recursions']}, {row['rank']}",
            str(row["threads"]),
            row["checkout"],
            f"{int(row['tokens']):,}",
            f"{float(row['cpu_seconds']):,.0f}",
            f"{float(row['wall_seconds']):,.0f}",
            f"{float(row['peak_mb']):,.0f}",
            short(row["perplexity"]),
        ]
        for row in rows.values()
    ]
    return (
        "# What a conversion costs in time and memory\n\nMade by `python benchmarks/conversion_cost.py smollm2`: "
        "SmolLM2-135M, each commit's default settings, without the check at the end; two recursions with four layers "
        "unshared at each end, three over all layers. Seconds and memory are those of the whole process; perplexity is "
        f"on held-out help topics of CPython.\n\n{markdown_table(head, lines)}\n"
    )


def run_smollm2(arguments: argparse.Namespace) -> None:
    """Measure all cases; the checkouts take turns."""
    setup = {"model": MODEL, "tokens": arguments.tokens or "default", "evaluation_tokens": arguments.evaluation_tokens}
    output = arguments.results / "conversion_cost.csv"
    results = KeyedResults(output, COLUMNS, key_of, setup, report)
    checkouts = [ROOT, *([arguments.baseline.resolve()] if arguments.baseline else [])]
    for threads in arguments.threads:
        for recursions in arguments.recursions:
            for rank in arguments.ranks:
                for checkout in checkouts:
                    figures = measure(checkout, recursions, rank, threads, arguments)
                    print(figures, file=sys.stderr, flush=True)
                    results.add(figures)
    print(report(results.rows))


def run_shape(arguments: argparse.Namespace) -> None:
    """Convert one tied group and two of the 8B shape, and extrapolate to all layers."""
    threads, groups = arguments.threads[0], (NUM_LAYERS - 2) // 2
    settings = {**ENDS, "calibration_tokens": arguments.tokens}
    measured: dict[int, Figures] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for count in (1, 2):
            dense = Path(scratch) / f"dense-{count}"
            write_checkpoint(dense, SHAPE_8B, 2 + 2 * count)
            cost, stages = convert(dense, Path(scratch) / "model", settings, threads=threads, source=ROOT)
            predicted = predict(dense, settings, threads)
            measured[count] = {**vars(cost), "stages": stages, "predicted": predicted}
            print(json.dumps(measured[count], indent=2), file=sys.stderr, flush=True)
        write_headers(Path(scratch) / "whole", SHAPE_8B, NUM_LAYERS)
        predicted = predict(Path(scratch) / "whole", settings, threads)
    whole = {
        name: measured[1][name] + (groups - 1) * (measured[2][name] - measured[1][name])
        for name in ("wall_seconds", "cpu_seconds", "peak_bytes")
    }
    figures = {
        "layers": NUM_LAYERS,
        "tokens": arguments.tokens,
        "threads": threads,
        "commit": commit(ROOT),
        "measured": measured,
        "extrapolated": whole,
        "predicted": predicted,
    }
    file = arguments.results / "conversion_cost_8b.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[f"{arguments.tokens} tokens, {threads} threads"] = figures
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def predict(dense: Path, settings: dict[str, Any], threads: int) -> dict[str, float] | None:
    """Cost on the CPU that the plan of a conversion estimates, as ``--dry-run --json`` prints it."""
    command = [sys.executable, "-m", "recursify", "convert", str(dense), "--dry-run", "--json", "--no-check"]
    options = {"num_prelude_layers": "--prelude", "num_coda_layers": "--coda", "num_recursions": "--recursions"}
    for name, value in settings.items():
        command += [options.get(name, f"--{name.replace('_', '-')}"), str(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    costs = json.loads(done.stdout).get("costs", [])
    return next((cost for cost in costs if cost["device"] == "cpu"), None)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    smollm2 = commands.add_parser("smollm2", help="SmolLM2-135M, beside another checkout")
    smollm2.add_argument("--baseline", type=Path, help="checkout to compare with")
    smollm2.add_argument("--recursions", type=int, nargs="+", default=sorted(LAYOUTS), choices=sorted(LAYOUTS))
    smollm2.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    smollm2.add_argument("--tokens", type=int, help="calibration tokens [each checkout's default]")
    smollm2.add_argument("--evaluation-tokens", type=int, default=16384)
    shape = commands.add_parser("shape", help="random layers of the 8B shape")
    shape.add_argument("--tokens", type=int, default=2048, help="calibration tokens [%(default)s]")
    shape.add_argument("--scratch", type=Path, help="folder for the checkpoints (9 GB) [the system's]")
    for command in (smollm2, shape):
        command.add_argument("--threads", type=int, nargs="+", default=THREADS)
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results [%(default)s]")
    return parser.parse_args()


def main() -> None:
    """Run one of the commands."""
    arguments = read_arguments()
    run_smollm2(arguments) if arguments.command == "smollm2" else run_shape(arguments)


if __name__ == "__main__":
    main()
