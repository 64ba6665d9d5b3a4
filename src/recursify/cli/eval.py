"""``recursify eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import recursify

from .options import DeviceOption, DtypeOption, JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

HELP = """
Score a recursive model on tasks of lm-evaluation-harness, at any depth, together with its dense model.

Scores are stored in `recursify.json`, and from there in the model card. lm-eval's own `--model hf` gives the same
figures; use `--model_args pretrained=DIR,trust_remote_code=True,exit_depth=0` there for a depth.

**Examples**

`recursify eval smollm2-healed --tasks arc_easy --tasks hellaswag --limit 200`

`recursify eval smollm2-exits --tasks my_task --include-path tasks/ --depth 0 --depth all`
"""

FULL_DEPTH = "all"


def command(
    folder: RecursiveArgument,
    tasks: Annotated[list[str], typer.Option("--tasks", help="Task of lm-eval. Repeatable.", show_default=False)],
    depth: Annotated[
        list[str] | None,
        typer.Option(
            "--depth",
            help="Depth at which every token exits; 0 is the first recursion, all is full depth. Repeatable. "
            "[default: all]",
            show_default=False,
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with further tasks.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            help="Number of solved examples in the prompt. Without it, the task's own.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Maximum number of samples per task.", min=1, show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per batch.", min=1)] = 8,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Score the dense model that was converted, too.")
    ] = True,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Store the scores in recursify.json.")] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        results = recursify.evaluate_tasks(
            folder,
            tasks,
            depths=[_read_depth(text) for text in depth or [FULL_DEPTH]],
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            control=control,
            save=save,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    print_json(results.to_dict()) if json else print_data(_table(results))


def _read_depth(text: str) -> int | None:
    if text == FULL_DEPTH:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is not a depth; use a number or all", param_hint="--depth") from error


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
