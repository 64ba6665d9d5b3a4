"""Quality of conversions without training, compared with the dense model and dense controls of the same size.

::

    python benchmarks/quality.py --rows all --tasks --output benchmarks/results/quality.csv

Every row is a model made from the same dense one: its stored parameters, perplexity on held-out text, agreement with
the dense model, and, with ``--tasks``, accuracy on three tasks of BIG-bench. Rows are written as they are done and
merged by name into the output, so a run can be continued with ``--rows name,name``. Beside the CSV lie a JSON file that
names texts, versions and settings, and a Markdown file with what every model writes after five prompts.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bigbench_tasks import DEFAULT_CACHE, PROMPT, TASKS, chance, evaluate_tasks, fetch_tasks
from dense_controls import Control, count_parameters, drop_layers, factorize
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.convert.settings import ConversionSettings
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import Text, default_text, token_windows
from recursify.modeling import RecursiveForCausalLM

MODEL = "smollm2-135m"
WINDOW = 512

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, a little girl who lived near the sea",
    "In Python, the difference between a list and a tuple is",
    "def fibonacci(n):\n",
)
NEW_TOKENS = 40

ENDS = {"num_prelude_layers": 4, "num_coda_layers": 4}
CYCLE = {"sharing": "cycle"}
PUBLISHED = {"initialization": "average", "relaxation": "svd"}
CALIBRATED = {"initialization": "calibrated", "relaxation": "calibrated"}
MAIN = {**ENDS, **CALIBRATED, "lora_rank": 64}
"""Conversion whose number of parameters the controls have."""


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: Value for ``--rows``.
        description: Title in the table.
        settings: Settings of the conversion; for a control, of the conversion whose size it has.
        control: Function that makes a control from the dense model, the parameter budget and calibration windows; None
            for a conversion.
    """

    name: str
    description: str
    settings: dict[str, Any] = field(default_factory=dict)
    control: Callable[[PreTrainedModel, int, Tensor], Control] | None = None


ROWS = {
    row.name: row
    for row in (
        Row(
            "dense", "dense", control=lambda dense, budget, windows: Control(dense, count_parameters(dense), "as it is")
        ),
        Row("ends4-r64", "prelude 4, coda 4, rank 64, calibrated", MAIN),
        Row(
            "ends4-r64-no-drift",
            "prelude 4, coda 4, rank 64, calibrated without drift correction",
            {**MAIN, "drift_correction": False},
        ),
        Row(
            "ends4-r64-tail",
            "prelude 4, coda 4, rank 64 on average (tail allocation), calibrated",
            {**MAIN, "rank_allocation": "tail"},
        ),
        Row("ends4-r64-published", "prelude 4, coda 4, rank 64, average + SVD (published)", {**MAIN, **PUBLISHED}),
        Row(
            "ends4-r64-fisher",
            "prelude 4, coda 4, rank 64, Fisher-weighted average + SVD",
            {**MAIN, "initialization": "fisher", "relaxation": "svd"},
        ),
        Row(
            "ends4-r0-stepwise",
            "prelude 4, coda 4, no residuals, stepwise (published)",
            {**ENDS, "lora_rank": 0, "initialization": "stepwise"},
        ),
        Row("ends4-r128", "prelude 4, coda 4, rank 128, calibrated", {**MAIN, "lora_rank": 128}),
        Row("cycle-r64", "cycle, rank 64, calibrated", {**CYCLE, **CALIBRATED, "lora_rank": 64}),
        Row("cycle-r128", "cycle, rank 128, calibrated", {**CYCLE, **CALIBRATED, "lora_rank": 128}),
        Row(
            "cycle3-r64",
            "three recursions, cycle, rank 64, calibrated",
            {**CYCLE, **CALIBRATED, "lora_rank": 64, "num_recursions": 3},
        ),
        Row(
            "dropped-layers",
            "control: whole layers dropped, size of ends4-r64",
            MAIN,
            lambda dense, budget, windows: drop_layers(dense, budget),
        ),
        Row(
            "low-rank",
            "control: low-rank linear maps (plain SVD), size of ends4-r64",
            MAIN,
            lambda dense, budget, windows: factorize(dense, budget),
        ),
        Row(
            "low-rank-aware",
            "control: low-rank linear maps (activation-aware), size of ends4-r64",
            MAIN,
            lambda dense, budget, windows: factorize(dense, budget, windows),
        ),
    )
}

FAST = ("dense", "ends4-r64-published", "ends4-r0-stepwise", "ends4-r64-no-drift", "dropped-layers", "low-rank-aware")
"""Rows that take a minute or two."""

FIGURES = ("parameters", "of_dense", "seconds_to_make", "perplexity", "top1_agreement", "kl", "tokens")
COLUMNS = (
    "row",
    "description",
    *FIGURES,
    *(f"{task}_{figure}" for task in TASKS for figure in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n")),
    "made_as",
    "commit",
    "date",
)

HEADLINE = {"general_knowledge": "acc", "phrase_relatedness": "acc_norm", "social_iqa": "acc_norm"}
"""Metric of each task in the printed table: that on which the dense model is farthest above chance."""


def say(message: str) -> None:
    """Print a message on stderr; only the table goes to stdout."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """The dense model, the texts, and what is measured with them.

    Args:
        num_windows: Held-out windows; None for all.
        task_cache: Folder of the tasks; None omits them.
        task_limit: Examples per task; None for all.
        models: Folder for the converted models.
    """

    def __init__(self, num_windows: int | None, task_cache: Path | None, task_limit: int | None, models: Path):
        checkpoint = open_checkpoint(MODEL)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(checkpoint)
        self.dense = checkpoint.load_model()
        self.task_cache = task_cache
        self.task_limit = task_limit
        self.models = models
        if task_cache is not None:
            fetch_tasks(task_cache)
        self.held_out: Text = default_text("held_out")
        self.windows = token_windows(self.tokenizer, self.held_out, WINDOW)[:num_windows]
        self.calibration: Text = default_text("calibration")
        defaults = ConversionSettings()
        self.calibration_windows = token_windows(
            self.tokenizer,
            self.calibration,
            defaults.calibration_length,
            max_tokens=defaults.calibration_tokens,
        )

    def setup(self) -> dict[str, Any]:
        """Facts that all rows of one output share."""
        packages = ("recursify", "torch", "transformers")
        tasks: dict[str, Any] = {}
        if self.task_cache is not None:
            guesses = chance(self.task_cache)
            tasks = {name: {"examples": self.task_limit or TASKS[name], "chance": guesses[name]} for name in TASKS}
            tasks |= {"prompt": PROMPT, "lm_eval": version("lm_eval")}
        return {
            "model": MODEL,
            "held_out_text": self.held_out.name,
            "held_out_windows": len(self.windows),
            "window": WINDOW,
            "calibration_text": self.calibration.name,
            "calibration_tokens": self.calibration_windows.numel(),
            "tasks": tasks,
            "new_tokens": NEW_TOKENS,
            "device": "cpu",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }

    def make(self, row: Row) -> tuple[Control, float]:
        """The model of ``row``, and the seconds it took to make (for a conversion, to plan, make and write)."""
        if row.control is not None:
            budget = 0
            if row.settings:
                budget = plan_conversion(MODEL, **row.settings).recursive.num_parameters
            start = time.perf_counter()
            return row.control(self.dense, budget, self.calibration_windows), time.perf_counter() - start
        folder = self.models / row.name
        start = time.perf_counter()
        conversion = convert_model(MODEL, folder, check=False, overwrite=True, **row.settings)
        seconds = time.perf_counter() - start
        model = RecursiveForCausalLM.from_pretrained(folder).eval()
        return Control(model, count_parameters(model), str(conversion.plan.layout)), seconds

    def measure(self, row: Row) -> tuple[dict[str, Any], list[str]]:
        """The figures of ``row``, by column, and what it writes after the prompts."""
        say(f"{row.name}: making")
        made, seconds = self.make(row)
        say(f"{row.name}: {made.num_parameters / 1e6:.1f}M in {seconds:.0f} s ({made.description}); measuring")
        comparison = compare(made.model, self.dense, self.windows)
        figures = {
            "row": row.name,
            "description": row.description,
            "parameters": made.num_parameters,
            "of_dense": round(made.num_parameters / count_parameters(self.dense), 4),
            "seconds_to_make": round(seconds, 1),
            "perplexity": f"{comparison.model.perplexity:.6g}",
            "top1_agreement": round(comparison.top1_agreement, 4),
            "kl": round(comparison.kl, 4),
            "tokens": comparison.model.num_tokens,
            "made_as": made.description,
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        if self.task_cache is not None:
            scores = evaluate_tasks(made.model, self.tokenizer, self.task_cache, limit=self.task_limit)
            for task, values in scores.items():
                figures |= {f"{task}_{name}": round(value, 4) for name, value in values.items()}
        say(
            f"{row.name}: perplexity {figures['perplexity']}, agreement {figures['top1_agreement']}, KL {figures['kl']}"
        )
        return figures, self._continue(made.model)

    def _continue(self, model: PreTrainedModel) -> list[str]:
        """The greedy continuations of the prompts, without the prompts; one left-padded batch."""
        end = self.tokenizer.eos_token_id
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        length = max(map(len, rows))
        ids = torch.tensor([[end] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
        written = model.generate(ids, attention_mask=mask, generation_config=greedy)
        return self.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)


def commit() -> str:
    """The commit checked out, marked where the tree differs from it; empty outside of Git."""
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=here, capture_output=True, text=True, check=False
    )
    return run.stdout.strip()


class Results:
    """The CSV, and the JSON and Markdown files beside it.

    Args:
        output: The CSV.
        setup: :meth:`Bench.setup`.

    Raises:
        SystemExit: The output holds figures taken under another setup.
    """

    def __init__(self, output: Path, setup: dict[str, Any]):
        self.output = output
        self.metadata_file = output.with_suffix(".json")
        self.rows: dict[str, dict[str, Any]] = {}
        self.metadata: dict[str, Any] = {"setup": setup, "rows": {}}
        if not output.exists():
            return
        with output.open(encoding="utf-8", newline="") as file:
            self.rows = {row["row"]: row for row in csv.DictReader(file)}
        self.metadata = json.loads(self.metadata_file.read_text(encoding="utf-8"))
        known = self.metadata["setup"]
        known["tasks"] = known["tasks"] or setup["tasks"]
        setup = {**setup, "tasks": setup["tasks"] or known["tasks"]}  # rows with and without tasks may be mixed
        if differing := [key for key in setup if known.get(key) != setup[key]]:
            lines = [f"  {key}: {known.get(key)} there, {setup[key]} here" for key in differing]
            raise SystemExit("\n".join([f"'{output}' was made otherwise; give another --output:", *lines]))

    def add(self, row: Row, figures: dict[str, Any], continuations: list[str]) -> None:
        """Put a row in, in place of an older one of its name, and write all three files."""
        self.rows[row.name] = figures
        self.metadata["rows"][row.name] = {
            "settings": row.settings,
            "threads": torch.get_num_threads(),
            "continuations": continuations,
        }
        self.rows = {name: self.rows[name] for name in ROWS if name in self.rows}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.metadata_file.write_text(json.dumps(self.metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with self.output.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        self.output.with_name(f"{self.output.stem}_samples.md").write_text(self._samples(), encoding="utf-8")
        self.output.with_suffix(".md").write_text(self._report(), encoding="utf-8")

    def _report(self) -> str:
        """The table with what a reader must know of it."""
        setup = self.metadata["setup"]
        return (
            f"# What conversion costs in quality\n\nMade by `python benchmarks/quality.py`; figures in "
            f"`{self.output.name}`, versions in `{self.metadata_file.name}`, what each model writes in "
            f"`{self.output.stem}_samples.md`.\n\nModel: {setup['model']}, **no training**. Held-out text: "
            f"{setup['held_out_text']}. Calibrated on {setup['calibration_tokens']:,} tokens of "
            f"{setup['calibration_text']}. Both are one domain, which favours every calibrated row, the low-rank "
            f"control included. Seconds depend on the machine and its other work.\n\n{self.table()}\n\n"
            f"Chance on the tasks: 0.144, 0.250 and 0.335.\n"
        )

    def _samples(self) -> str:
        """Continuations of every model, by prompt."""
        lines = ["# Greedy continuations", "", f"{MODEL}, {NEW_TOKENS} tokens, no training after conversion."]
        for index, prompt in enumerate(PROMPTS):
            lines += ["", f"## `{prompt.strip()}`", ""]
            for name, figures in self.rows.items():
                text = self.metadata["rows"][name]["continuations"][index]
                lines += [f"{figures['description']} (perplexity {_short(figures['perplexity'])}):", ""]
                lines += ["```text", *text.replace("```", "'''").strip("\n").splitlines(), "```", ""]
        return "\n".join(lines).rstrip() + "\n"

    def table(self) -> str:
        """The rows as Markdown."""
        tasks = [task for task in TASKS if any(row.get(f"{task}_acc") not in (None, "") for row in self.rows.values())]
        head = ["", "parameters", "perplexity", "top-1 agreement", "KL", "seconds to make"]
        head += [f"{task} {HEADLINE[task]}" for task in tasks]
        lines = [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
        for row in self.rows.values():
            cells = [
                row["description"],
                f"{int(row['parameters']) / 1e6:.1f}M",
                _short(row["perplexity"]),
                f"{float(row['top1_agreement']):.1%}",
                f"{float(row['kl']):.3f}",
                f"{float(row['seconds_to_make']):.0f}",
                *(_accuracy(row, task) for task in tasks),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _short(perplexity: str) -> str:
    value = float(perplexity)
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _accuracy(row: dict[str, Any], task: str) -> str:
    key = f"{task}_{HEADLINE[task]}"
    if row.get(key) in (None, ""):
        return "–"
    return f"{float(row[key]):.3f} ± {float(row[f'{key}_stderr']):.3f}"


def choose_rows(text: str) -> list[Row]:
    """The rows that ``--rows`` names: ``all``, ``fast`` or names with commas between.

    Raises:
        SystemExit: An unknown name; the message lists those that exist.
    """
    names = {"all": tuple(ROWS), "fast": FAST}.get(text) or tuple(text.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"Unknown rows: {', '.join(unknown)}. Use all, fast, or some of: {', '.join(ROWS)}.")
    return [ROWS[name] for name in names]


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what a conversion costs in quality, without training.")
    parser.add_argument("--rows", default="fast", help=f"all, fast, or names with commas: {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, required=True, help="CSV; rows of other names in it are kept")
    parser.add_argument("--windows", type=int, default=None, help=f"held-out windows of {WINDOW} tokens (default: all)")
    parser.add_argument("--tasks", action="store_true", help="score three tasks of BIG-bench, too (needs lm-eval)")
    parser.add_argument("--task-cache", type=Path, default=DEFAULT_CACHE, help="where the tasks are kept")
    parser.add_argument("--task-limit", type=int, default=None, help="examples per task, to try things out")
    parser.add_argument("--models", type=Path, default=None, help="keep the converted models in this folder")
    return parser.parse_args()


def main() -> None:
    """Measure the chosen rows, one after the other."""
    arguments = read_arguments()
    rows = choose_rows(arguments.rows)
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models or Path(scratch)
        models.mkdir(parents=True, exist_ok=True)
        task_cache = arguments.task_cache if arguments.tasks else None
        bench = Bench(arguments.windows, task_cache, arguments.task_limit, models)
        results = Results(arguments.output, bench.setup())
        for row in rows:
            results.add(row, *bench.measure(row))
    print(results.table())


if __name__ == "__main__":
    main()
