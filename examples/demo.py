"""Convert SmolLM2-135M twice, uptrain it briefly, and compare with the dense model and the published initialization.

Run it with ``make demo``. It needs no GPU, no account and no network once its packages are installed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from transformers.utils import logging as transformers_logging

import recursify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "smollm2-135m"
LAYOUT = {"num_recursions": 2, "num_prelude_layers": 4, "num_coda_layers": 4, "lora_rank": 64}
CALIBRATION_TOKENS = 4096
"""A quarter of the default, for less of its time."""
CONVERSIONS = {
    "published (average + SVD)": {"initialization": "average", "relaxation": "svd"},
    "calibrated": {"initialization": "calibrated", "relaxation": "calibrated"},
}
UPTRAINING = recursify.UptrainSettings(
    max_tokens=4096, length=256, batch_size=1, eval_sequences=1, trainer={"save_strategy": "no"}
)
"""A minute of distillation from the dense model; for real use, take a thousand times as many tokens."""
PROMPT = "The three primary colors are"
NUM_WINDOWS = 4
WINDOW = 512
NEW_TOKENS = 32
SPEED_RUNS = 3
HEADER = ["SmolLM2-135M", "parameters", "bytes", "perplexity", "same token", "KL", "tokens/s"]


@dataclass
class Row:
    """One line of the table: a model, its figures on held-out text, and what it generates.

    Attributes:
        name: Title.
        model: The model.
        figures: Perplexity, and the comparison with the dense model.
        text: Prompt and greedy continuation.
        speeds: Tokens per second of each run.
    """

    name: str
    model: PreTrainedModel
    figures: recursify.EvaluationResult
    text: str = ""
    speeds: list[float] = field(default_factory=list)

    def generate(self, tokenizer: Any) -> None:
        """Continue the prompt once, and measure the time."""
        prompt = tokenizer(PROMPT, return_tensors="pt")
        start = time.perf_counter()
        output = self.model.generate(**prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        self.speeds.append(NEW_TOKENS / (time.perf_counter() - start))
        self.text = tokenizer.decode(output[0], skip_special_tokens=True)

    def cells(self) -> list[str]:
        """The line of the table."""
        parameters, figures = list(self.model.parameters()), self.figures
        return [
            self.name,
            f"{sum(p.numel() for p in parameters) / 1e6:.1f}M",
            f"{sum(p.numel() * p.element_size() for p in parameters) / 1e6:.0f} MB",
            f"{figures.perplexity:,.1f}",
            "" if figures.agreement is None else f"{figures.agreement:.1%}",
            "" if figures.kl is None else f"{figures.kl:.2f}",
            f"{statistics.median(self.speeds):.1f}",
        ]


class ProgressLine:
    """One line on stderr that follows the work; where that is not a terminal, one line per finished step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.step = ""

    def begin(self, step: str) -> None:
        """Begin a step; its stages are shown behind its name."""
        self.end()
        self.step = step
        self._show(step)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        self._show(f"{self.step}: {stage} {done}/{total}")

    def end(self) -> None:
        """Finish the step."""
        if self.step and not sys.stderr.isatty():
            print(f"{self.step}: done after {time.perf_counter() - self.start:.0f} s", file=sys.stderr)
        self._show("")
        self.step = ""

    def _show(self, text: str) -> None:
        if sys.stderr.isatty():
            seconds = f"{time.perf_counter() - self.start:4.0f} s  " if text else ""
            print(f"\r\033[K{seconds}{text}", end="", file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> str:
    """Align columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def make_rows(source: str, scratch: Path, output: Path | None, progress: ProgressLine) -> tuple[list[Row], Any]:
    """Load the dense model, convert twice, uptrain once; measure each on held-out text.

    Returns:
        The rows, and the tokenizer.
    """
    progress.begin("dense")
    dense, tokenizer = recursify.load_model(source)
    windows: dict[str, Any] = {"tokenizer": tokenizer, "length": WINDOW, "max_tokens": NUM_WINDOWS * WINDOW}
    rows = [Row("dense", dense, recursify.evaluate_model(dense, progress=progress, **windows))]

    def add(name: str, folder: Path) -> None:
        model, _ = recursify.load_model(folder)
        rows.append(Row(name, model, recursify.evaluate_model(model, against=dense, progress=progress, **windows)))

    for name, strategy in CONVERSIONS.items():
        progress.begin(name)
        folder = output if name == "calibrated" and output else scratch / name.split()[0]
        settings = {**LAYOUT, "calibration_tokens": CALIBRATION_TOKENS, **strategy}
        recursify.convert_model(source, folder, check=False, overwrite=True, progress=progress, **settings)
        add(name, folder)
    name = f"uptrained, {UPTRAINING.max_tokens:,} tokens"
    progress.begin(name)
    recursify.uptrain_model(folder, scratch / "uptrained", settings=UPTRAINING, progress=progress)
    add(name, scratch / "uptrained")
    return rows, tokenizer


def main() -> None:
    """Make four models, measure them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="another dense model [%(default)s]")
    parser.add_argument("--output", type=Path, help="keep the calibrated model here")
    arguments = parser.parse_args()
    for name in ("torchao", "torch.utils._pytree"):  # both warn as they are imported, where torchao is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    progress = ProgressLine()
    with tempfile.TemporaryDirectory() as scratch:
        rows, tokenizer = make_rows(arguments.model, Path(scratch), arguments.output, progress)
        progress.begin("speed")
        for run in range(SPEED_RUNS):  # interleaved, so that a slow moment of the machine hits all models
            for row in rows:
                row.generate(tokenizer)
            progress("runs", run + 1, SPEED_RUNS)
        progress.end()
    for row in rows:
        print(f"\n[{row.name}] {row.text}")
    print("\n" + table([HEADER, *(row.cells() for row in rows)]))
    figures, seconds = rows[0].figures, time.perf_counter() - progress.start
    print(
        f"\nHeld-out text: {figures.text}, {NUM_WINDOWS * WINDOW:,} tokens. tokens/s: the median of {SPEED_RUNS} "
        f"interleaved runs of {NEW_TOKENS} tokens. {seconds:.0f} s in all."
    )


if __name__ == "__main__":
    main()
