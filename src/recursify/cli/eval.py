"""``recursify eval``."""

from __future__ import annotations

from typing import Annotated

import typer

import recursify
from recursify import TaskSettings

from .from_settings import options_from_settings
from .options import DeviceOptions, JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

HELP = """
Score a recursive model on tasks of lm-evaluation-harness, at any depth, together with its dense model.

Scores are stored in `recursify.json`, and from there in the model card. lm-eval's own `--model hf` gives the same
figures; use `--model_args pretrained=DIR,trust_remote_code=True,exit_depth=0` there for a depth.

**Examples**

`recursify eval smollm2-healed --tasks arc_easy --tasks hellaswag --limit 200`

`recursify eval smollm2-exits --tasks my_task --include-path tasks/ --depth 0 --depth all`
"""


@options_from_settings
def command(
    folder: RecursiveArgument,
    tasks: Annotated[list[str], typer.Option("--tasks", help="Task of lm-eval. Repeatable.", show_default=False)],
    loading: DeviceOptions,
    settings: TaskSettings,
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        results = recursify.evaluate_tasks(folder, tasks, settings=settings, progress=progress, **vars(loading))
    print_json(results.to_dict()) if json else print_data(_table(results))


def _table(results: recursify.TaskResults) -> str:
    """One row per task and metric, a column per depth, the dense model last."""
    rows: dict[tuple[str, str], list[str]] = {}
    for entry in results.entries:
        rows.setdefault((entry["name"], entry["metric"]), []).append(_score(entry["value"], entry["stderr"]))
    for entry in results.entries[: len(rows)]:
        rows[entry["name"], entry["metric"]].append(_score(entry["dense_value"], entry["dense_stderr"]))
    names = ["full depth" if depth is None else f"depth {depth}" for depth in results.depths]
    lines = [[f"{task}, {metric}", *cells] for (task, metric), cells in rows.items()]
    return format_table(["task", *names, "dense"], lines)


def _score(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
