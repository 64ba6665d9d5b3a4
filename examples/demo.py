"""Convert SmolLM2-135M twice, uptrain it briefly, and compare with the dense model and the published initialization.

Run it with ``make demo``. It needs no GPU, no account and no network once its packages are installed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

import recursify

MODEL = "smollm2-135m"
LAYOUT = {"num_recursions": 2, "num_prelude_layers": 4, "num_coda_layers": 4, "lora_rank": 64}
CALIBRATION_TOKENS = 8192
"""Half of the default, for half of its time."""
ROWS = {
    "published (average + SVD)": {"initialization": "average", "relaxation": "svd"},
    "calibrated": {"initialization": "calibrated", "relaxation": "calibrated"},
}
UPTRAINING = recursify.UptrainSettings(max_tokens=8192, length=256, batch_size=1, eval_sequences=4)
"""90 seconds of distillation from the dense model; for real use, take a thousand times as many tokens."""
PROMPT = "The three primary colors are"
NUM_WINDOWS = 12
WINDOW = 512
NEW_TOKENS = 32
HEADER = ["SmolLM2-135M", "parameters", "bytes", "perplexity", "same token", "KL", "tokens/s"]


@dataclass(frozen=True)
class Row:
    """One line of the table, with the generated text."""

    cells: list[str]
    text: str
    held_out: str


def measure(name: str, model: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any) -> Row:
    """Measure size, held-out perplexity, agreement with the dense model, and tokens per second of greedy decoding."""
    result = recursify.evaluate_model(
        model, tokenizer=tokenizer, against=dense, length=WINDOW, max_tokens=NUM_WINDOWS * WINDOW
    )
    prompt = tokenizer(PROMPT, return_tensors="pt")
    start = time.perf_counter()
    output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)[0]
    seconds = time.perf_counter() - start
    parameters = list(model.parameters())
    cells = [
        name,
        f"{sum(p.numel() for p in parameters) / 1e6:.1f}M",
        f"{sum(p.numel() * p.element_size() for p in parameters) / 1e6:.0f} MB",
        f"{result.perplexity:,.1f}",
        f"{result.agreement:.1%}",
        f"{result.kl:.2f}",
        f"{NEW_TOKENS / seconds:.1f}",
    ]
    return Row(cells, tokenizer.decode(output, skip_special_tokens=True), result.text)


def report(stage: str, done: int, total: int) -> None:
    """Print the end of a stage."""
    if done == total:
        print(f"{stage}: {done}/{total}", file=sys.stderr)


def table(rows: list[list[str]]) -> str:
    """Align columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def main() -> None:
    """Convert twice, uptrain once, measure four models, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="keep the calibrated model here")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    start = time.perf_counter()
    dense, tokenizer = recursify.load_model(MODEL)
    rows = [measure("dense", dense, dense, tokenizer)]
    with tempfile.TemporaryDirectory() as scratch:
        for name, strategy in ROWS.items():
            folder = arguments.output if name == "calibrated" and arguments.output else Path(scratch) / name.split()[0]
            print(f"\n{name}", file=sys.stderr)
            settings = {**LAYOUT, "calibration_tokens": CALIBRATION_TOKENS, **strategy}
            recursify.convert_model(MODEL, folder, check=False, overwrite=True, progress=report, **settings)
            rows.append(measure(name, recursify.load_model(folder)[0], dense, tokenizer))
        name = f"uptrained, {UPTRAINING.max_tokens:,} tokens"
        print(f"\n{name}", file=sys.stderr)
        result = recursify.uptrain_model(folder, Path(scratch) / "uptrained", settings=UPTRAINING, progress=report)
        rows.append(measure(name, recursify.load_model(result.output)[0], dense, tokenizer))
    for row in rows:
        print(f"\n[{row.cells[0]}] {row.text}")
    print("\n" + table([HEADER, *(row.cells for row in rows)]))
    seconds = time.perf_counter() - start
    print(f"\nHeld-out text: {rows[0].held_out}, {NUM_WINDOWS * WINDOW:,} tokens. {seconds:.0f} s in all.")


if __name__ == "__main__":
    main()
