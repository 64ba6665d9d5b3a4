"""Conversion of Qwen2.5-Coder-1.5B-Instruct, a Q4_K_M ``.gguf``: its time and memory, and what it costs in quality.

::

    python benchmarks/large_model.py dry-run
    python benchmarks/large_model.py --threads 2 convert
    python benchmarks/large_model.py quality --rows dense,q8_0,q4_0

The model is fetched once (``large_model_file.py``). ``dry-run`` and ``convert`` measure whole processes; their figures
go to ``results/large_model_cost.json``. ``quality`` writes ``results/large_model.*`` (``large_model_quality.py`` has
its rows); rows are written as they are done and merged by name, so a run can be continued with ``--rows``. Models that
were converted stay in the cache folder and are taken from there. ``--model smollm2-135m`` tries everything out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from large_model_file import DEFAULT_CACHE, converted_folder, fetch_large_model, sha256
from measured_process import Cost, convert, run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LAYOUT: dict[str, Any] = {"num_recursions": 2, "num_prelude_layers": 4, "num_coda_layers": 4, "dtype": "float16"}
CALIBRATION_TOKENS = 4096
COMMAND = "from recursify.cli.app import main; main()"


def figures_of(cost: Cost) -> dict[str, float]:
    """Rounded figures of a process, in seconds and MB."""
    return {
        "wall_seconds": round(cost.wall_seconds, 1),
        "cpu_seconds": round(cost.cpu_seconds, 1),
        "peak_mb": round(cost.peak_bytes / 1e6),
    }


def dry_run(model: str, repeats: int, source: Path) -> list[dict[str, Any]]:
    """Cost of ``recursify convert MODEL --dry-run`` of a checkout."""
    command = [sys.executable, "-c", COMMAND, "convert", model, "--dry-run", "--prelude", "4", "--coda", "4"]
    environment = {"PYTHONPATH": str(source / "src"), "HF_HUB_OFFLINE": "1"}
    return [figures_of(run(command, environment)) for _ in range(repeats)]


def convert_once(model: str, folder: Path, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Cost of a conversion without the check, whole and by stage."""
    settings = {**LAYOUT, "calibration_tokens": CALIBRATION_TOKENS, **settings}
    cost, stages = convert(model, folder, settings, threads=threads, source=ROOT)
    by_stage = {name: figures_of(Cost(**figures)) for name, figures in stages.items()}
    return {**figures_of(cost), "threads": threads, "settings": settings, "stages": by_stage}


def commit(checkout: Path) -> str:
    """Short commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def record(output: Path, entry: str, figures: Any, model: Path) -> None:
    """Put figures under a name into the JSON file, beside the model's."""
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    if model.exists():
        known["model"] = {"file": model.name, "bytes": model.stat().st_size, "sha256": sha256(model)}
    known[entry] = {"date": datetime.now(UTC).date().isoformat(), "figures": figures}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another dense model, to try things out")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the model and of conversions")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results [%(default)s]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads [%(default)s]")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("dry-run", help="time and memory of --dry-run")
    plan.add_argument("--repeats", type=int, default=3)
    plan.add_argument("--baseline", type=Path, help="checkout to measure in place of this one")
    once = commands.add_parser("convert", help="time and memory of a conversion, by stage")
    once.add_argument("--rank", type=int, default=256)
    once.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS)
    quality = commands.add_parser("quality", help="the table of rows")
    quality.add_argument("--rows", default="all", help="all, or names with commas")
    quality.add_argument("--windows", type=int, default=4, help="windows of 512 tokens of each text")
    quality.add_argument("--tasks", type=int, default=None, help="coding tasks, the first ones (default: all)")
    quality.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS, help="calibration tokens")
    return parser.parse_args()


def main() -> None:
    """Run one of the commands."""
    arguments = read_arguments()
    model = arguments.model or str(fetch_large_model(arguments.cache))
    costs = arguments.results / "large_model_cost.json"
    if arguments.command == "dry-run":
        source = (arguments.baseline or ROOT).resolve()
        figures = dry_run(model, arguments.repeats, source)
        record(costs, f"dry_run_{commit(source)}", figures, Path(model))
    elif arguments.command == "convert":
        folder = converted_folder(arguments.cache, model, f"r{arguments.rank}", arguments.tokens)
        settings = {"lora_rank": arguments.rank, "calibration_tokens": arguments.tokens}
        figures = convert_once(model, folder, settings, arguments.threads)
        record(costs, f"convert_{arguments.threads}_threads_{commit(ROOT)}", figures, Path(model))
    else:
        from large_model_quality import write_table  # imports torch, whose size the measured processes would inherit

        write_table(model, arguments)


if __name__ == "__main__":
    main()
