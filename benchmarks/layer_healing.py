"""Compare layer-wise with end-to-end healing in the same time, and both in sequence.

::

    python benchmarks/layer_healing.py --tokens 65536

One conversion of the demo model is healed (1) by ``--stage layers`` on ``--tokens`` tokens, (2) by ``--stage heal``
for as many seconds, its tokens chosen from the rate that a short run of it shows, (3) by ``heal`` for those seconds
from where (1) ended, and (4) by ``heal`` for the seconds of (3). All are then measured beside the dense model on the
same held-out windows.

Seconds are those of training, without loading models and data and without held-out evaluations. If other processes
disturb the run, the times differ; the table has the actual ones. Compare rows whose times agree.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.convert.pipeline import convert_model
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

MODEL = "smollm2-135m"
CONVERSION = {
    "num_prelude_layers": 4,
    "num_coda_layers": 4,
    "lora_rank": 64,
    "initialization": "calibrated",
    "relaxation": "calibrated",
}
WINDOW = 512
RATE_STEPS = 4
"""Steps of the run that shows how fast ``heal`` is."""


class Stopwatch:
    """Progress callback that records the time of the first and the last step."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.marks = [*self.marks[:1], (done, time.perf_counter())]
        print(f"\r{stage} {done}/{total}    ", end="", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, extrapolated to those before the first report (the first step of ``heal``)."""
        (first, start), (last, end) = self.marks
        return (end - start) * last / (last - first)


def heal(source: Path, output: Path, settings: UptrainSettings) -> tuple[float, int]:
    """Run one stage; return seconds of training and tokens."""
    watch = Stopwatch()
    result = uptrain_model(source, output, settings=settings, overwrite=True, progress=watch)
    print(file=sys.stderr)
    return watch.seconds, result.tokens


def heal_for(seconds: float, source: Path, output: Path, settings: UptrainSettings) -> tuple[float, int]:
    """Run ``heal`` on as many tokens as ``seconds`` allow."""
    per_step = settings.batch_size * settings.length
    spent, tokens = heal(source, output, replace(settings, max_tokens=RATE_STEPS * per_step))
    steps = max(2, round(seconds * tokens / spent / per_step))
    return heal(source, output, replace(settings, max_tokens=steps * per_step))


def commit() -> str:
    """Current commit, marked if the tree differs from it; empty outside of Git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of stage layers [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per step [%(default)s]")
    parser.add_argument("--passes", type=int, default=UptrainSettings.layer_passes, help="[%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=UptrainSettings.learning_rate, help="[%(default)s]")
    parser.add_argument(
        "--layer-learning-rate", type=float, default=UptrainSettings.learning_rate, help="[%(default)s]"
    )
    parser.add_argument("--windows", type=int, default=None, help=f"held-out windows of {WINDOW} tokens [all]")
    parser.add_argument("--converted", type=Path, default=None, help="a model converted as here, not to convert again")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/layer_healing.csv"), help="[%(default)s]"
    )
    return parser.parse_args()


def run_all(arguments: argparse.Namespace, scratch: Path) -> list[tuple[str, Path | None, float, int]]:
    """Train the models; return name, folder (None for the dense one), seconds and tokens."""
    source = arguments.converted
    if source is None:
        source = scratch / "converted"
        convert_model(MODEL, source, check=False, overwrite=True, **CONVERSION)
    held_out = scratch / "held_out.txt"
    held_out.write_text(default_text("held_out").documents[0][: 4 * arguments.length], encoding="utf-8")
    settings = UptrainSettings(
        length=arguments.length,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        layer_passes=arguments.passes,
        eval_data=(str(held_out),),
        eval_every=10**6,
        save_every=10**6,
    )
    layers, end_to_end, both = (scratch / name for name in ("layers", "heal", "both"))
    by_layer = replace(
        settings, stage="layers", max_tokens=arguments.tokens, learning_rate=arguments.layer_learning_rate
    )
    seconds, tokens = heal(source, layers, by_layer)
    rows: list[tuple[str, Path | None, float, int]] = [
        ("dense", None, 0.0, 0),
        ("converted", source, 0.0, 0),
        ("layers", layers, seconds, tokens),
        ("heal", end_to_end, *heal_for(seconds, source, end_to_end, settings)),
    ]
    more_seconds, more_tokens = heal_for(seconds, layers, both, settings)
    rows.append(("layers, then heal", both, seconds + more_seconds, tokens + more_tokens))
    twice = scratch / "twice"
    rows.append(("heal, twice the seconds", twice, *heal_for(seconds + more_seconds, source, twice, settings)))
    return rows


def measure(arguments: argparse.Namespace, rows: list[tuple[str, Path | None, float, int]]) -> list[dict[str, Any]]:
    """Measure all models on the same windows."""
    checkpoint = open_checkpoint(MODEL)
    dense: PreTrainedModel = checkpoint.load_model(torch.float32)
    windows = token_windows(load_tokenizer(checkpoint), default_text("held_out"), WINDOW)[: arguments.windows]
    table = []
    for name, folder, seconds, tokens in rows:
        model = dense if folder is None else RecursiveForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        comparison = compare(model, dense, windows)
        table.append(
            {
                "row": name,
                "seconds": round(seconds, 1),
                "tokens": tokens,
                "perplexity": round(comparison.model.perplexity, 3),
                "top1_agreement": round(comparison.top1_agreement, 4),
                "kl": round(comparison.kl, 4),
                "held_out_tokens": comparison.model.num_tokens,
                "length": arguments.length,
                "batch_size": arguments.batch_size,
                "layer_passes": arguments.passes,
                "learning_rate": arguments.learning_rate,
                "layer_learning_rate": arguments.layer_learning_rate,
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                **{package: version(package) for package in ("recursify", "torch", "transformers")},
                "commit": commit(),
                "date": datetime.now(UTC).date().isoformat(),
            }
        )
        print({key: table[-1][key] for key in list(table[-1])[:6]}, file=sys.stderr, flush=True)
    return table


def main() -> None:
    """Train, measure, report."""
    arguments = read_arguments()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="recursify-benchmark-") as scratch:
        table = measure(arguments, run_all(arguments, Path(scratch)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    shown = ["row", "seconds", "tokens", "perplexity", "top1_agreement", "kl"]
    print("| " + " | ".join(shown) + " |\n|---" + "|--:" * (len(shown) - 1) + "|")
    for row in table:
        print("| " + " | ".join(str(row[key]) for key in shown) + " |")


if __name__ == "__main__":
    main()
