"""Measure quality against training tokens, for converted models and for alternatives.

::

    python benchmarks/uptraining.py --tokens 15000 60000 250000 --output benchmarks/results/uptraining.csv

Every row is one model and one budget, a run of its own from the same start, its learning rate falling to zero at the
end. All see the same tokens in the same order. Rows are merged by name and budget into the output, so a benchmark can
be continued with ``--rows`` and ``--tokens``. The rows:

- ``calibrated`` and ``published`` (average and SVD): the same layout, converted in two ways, healed by distillation;
- ``dropped-layers``: the dense model with whole layers left out until it is as small, healed by the same distillation;
- ``dense``: the dense model itself, trained on the same tokens. It is what the text alone does.

A dense model is a recursive one of a single recursion, so all four are trained by the same command.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dense_controls import drop_layers
from keyed_results import KeyedResults, markdown_table, short
from quality import MAIN, MODEL, PUBLISHED, WINDOW, commit
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.cli.report import format_table, print_data, talk
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import default_text, read_text, token_windows
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.run import uptrain_model
from recursify.uptrain.settings import UptrainSettings

COLUMNS = (
    "row",
    "tokens",
    "parameters",
    "perplexity",
    "top1_agreement",
    "kl",
    "other_perplexity",
    "commit",
    "date",
)
OTHER_TOKENS = 8_192
"""Columns of text from another domain, if given."""
UNFOLDED = {"num_recursions": 1, "sharing": "cycle", "lora_rank": 0, "calibration_data": []}


@dataclass(frozen=True)
class Row:
    """A model to train.

    Attributes:
        description: Description for the table.
        conversion: Settings of the conversion.
        drops_layers: Convert the dense model without as many layers as the calibrated model saves.
        training: Settings of its training that are its own.
    """

    description: str
    conversion: dict[str, Any]
    drops_layers: bool = False
    training: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "calibrated": Row("calibrated, prelude 4, coda 4, rank 64", MAIN),
    "published": Row("average + SVD, same layout", {**MAIN, **PUBLISHED, "calibration_data": []}),
    "dropped-layers": Row("control: whole layers dropped, same size", UNFOLDED, drops_layers=True),
    "dense": Row("control: the dense model", UNFOLDED, training={"kl_weight": 0.0}),
}


class Bench:
    """Conversion, training and measurement of the rows.

    Args:
        arguments: The command line.
        scratch: A folder for models.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.scratch = scratch
        checkpoint = open_checkpoint(MODEL)
        self.tokenizer = load_tokenizer(checkpoint)
        self.dense = checkpoint.load_model(torch.float32)
        text = default_text("held_out")
        self.windows = token_windows(self.tokenizer, text, WINDOW, max_tokens=arguments.windows * WINDOW)
        other = read_text(arguments.other) if arguments.other else None
        self.other = None if other is None else token_windows(self.tokenizer, other, WINDOW, max_tokens=OTHER_TOKENS)
        data = self._training_text(arguments.data)
        self.settings = UptrainSettings(
            data=tuple(data),
            length=256,
            batch_size=1,
            eval_sequences=2,
            eval_every=10**6,
            save_every=10**6,
            precision=arguments.precision,
        )
        self.setup = {
            "model": MODEL,
            "held_out_text": text.name,
            "held_out_tokens": self.windows.numel(),
            "other_text": None if other is None else other.name,
            "training_text": arguments.data or default_text("calibration").name,
            "settings": {k: v for k, v in self.settings.to_dict().items() if k not in ("data", "max_tokens")},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "accelerate", "recursify")},
            },
        }

    def _training_text(self, given: list[str] | None) -> list[str]:
        """Training data; the default text is written to files, so that a part is held out as of any others."""
        if given:
            return given
        folder = self.scratch / "text"
        folder.mkdir()
        for index, document in enumerate(default_text("calibration").documents):
            (folder / f"{index:03}.txt").write_text(document, encoding="utf-8")
        return [str(folder)]

    def start(self, name: str) -> Path:
        """The folder of the untrained model of a row."""
        folder = self.scratch / name
        if folder.exists():
            return folder
        row = ROWS[name]
        source = MODEL
        if row.drops_layers:
            budget = plan_conversion(MODEL, **MAIN).recursive.num_parameters
            source = str(self.scratch / "fewer-layers")
            drop_layers(self.dense, budget).model.save_pretrained(source)
            self.tokenizer.save_pretrained(source)
        talk.print(f"{name}: making")
        convert_model(source, folder, check=False, overwrite=True, **row.conversion)
        return folder

    def measure(self, name: str, tokens: int) -> dict[str, Any]:
        """Train the model of a row on ``tokens`` tokens, and measure it."""
        folder = start = self.start(name)
        if tokens:
            folder = self.scratch / f"{name}-{tokens}"
            settings = {**self.settings.to_dict(), **ROWS[name].training, "teacher": MODEL, "max_tokens": tokens}
            uptrain_model(
                start,
                folder,
                settings=UptrainSettings.from_mapping(settings, "the benchmark"),
                overwrite=True,
                progress=lambda stage, done, total: (
                    talk.print(f"{name}: {stage} {done}/{total}") if done % 5120 == 0 else None
                ),
            )
        model = RecursiveForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        comparison = compare(model, self.dense, self.windows)
        other = None if self.other is None else compare(model, self.dense, self.other).model.perplexity
        return {
            "row": name,
            "tokens": tokens,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "perplexity": f"{comparison.model.perplexity:.6g}",
            "top1_agreement": round(comparison.top1_agreement, 4),
            "kl": round(comparison.kl, 4),
            "other_perplexity": "" if other is None else f"{other:.6g}",
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }


def row_key(figures: dict[str, Any]) -> tuple[int, int]:
    """Rows in the order of :data:`ROWS`, then by budget."""
    return list(ROWS).index(figures["row"]), int(figures["tokens"])


def write_report(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """The table with what a reader must know of it."""
    by_row = {(row["row"], int(row["tokens"])): row for row in rows.values()}
    budgets = sorted({tokens for _, tokens in by_row})
    lines = []
    for name, row in ROWS.items():
        found = {tokens: by_row[name, tokens] for tokens in budgets if (name, tokens) in by_row}
        if found:
            size = f"{int(next(iter(found.values()))['parameters']) / 1e6:.1f}M"
            lines.append([row.description, size, *(_cell(found.get(tokens)) for tokens in budgets)])
    other = f" In brackets, perplexity on {setup['other_text']}." if setup["other_text"] else ""
    table = markdown_table(["", "parameters", *(f"{tokens:,} tokens" for tokens in budgets)], lines)
    return (
        f"# Quality against tokens of uptraining\n\nMade by `python benchmarks/uptraining.py`; figures in "
        f"`{output.name}`, settings and versions in `{output.with_suffix('.json').name}`.\n\n"
        f"Model: {setup['model']}. Cells: perplexity, and how often the first choice is the untrained dense model's, "
        f"on {setup['held_out_tokens']:,} tokens of {setup['held_out_text']}.{other} Training text: "
        f"{setup['training_text']}; a budget beyond it repeats it. The converted models and the one with layers "
        f"dropped learn from the dense model and the text, the dense control from the text.\n\n{table}\n"
    )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    other = f" ({short(row['other_perplexity'])})" if row["other_perplexity"] else ""
    return f"{short(row['perplexity'])}{other}, {float(row['top1_agreement']):.1%}"


def main() -> None:
    """Measure the chosen rows at the chosen budgets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[15_000, 60_000], help="budgets; 0 is always measured")
    parser.add_argument("--data", nargs="+", help="text to train on (default: Python's help topics)")
    parser.add_argument("--other", nargs="+", help="text of another domain to measure on, too")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--windows", type=int, default=16, help=f"held-out windows of {WINDOW} tokens")
    parser.add_argument("--output", type=Path, required=True, help="CSV; other rows in it are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        report = partial(write_report, bench.setup, arguments.output)
        results = KeyedResults(arguments.output, COLUMNS, row_key, bench.setup, report)
        for tokens in [0, *sorted(arguments.tokens)]:
            for name in arguments.rows:
                if tokens == 0 and (list(ROWS).index(name), 0) in results.rows:
                    continue
                figures = bench.measure(name, tokens)
                results.add(figures)
                talk.print(f"{name} after {tokens:,} tokens: perplexity {figures['perplexity']}")
    columns = COLUMNS[:7]
    print_data(format_table(list(columns), [[str(row[key]) for key in columns] for row in results.rows.values()]))


if __name__ == "__main__":
    main()
