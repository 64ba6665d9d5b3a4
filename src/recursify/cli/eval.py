"""``recursify eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DeviceOption, DtypeOption, JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

EXAMPLES = """
Score a recursive model on tasks of lm-evaluation-harness, at any depth, beside its dense model.

What is measured goes into `recursify.json`, and from there into the model card. The same figures come from lm-eval's
own `--model hf`; a depth is `--model_args pretrained=DIR,trust_remote_code=True,exit_depth=0` there.

**Examples**

`recursify eval smollm2-healed --tasks arc_easy --tasks hellaswag --limit 200`

`recursify eval smollm2-exits --tasks my_task --include-path tasks/ --depth 0 --depth all`
"""

FULL_DEPTH = "all"


def register(app: typer.Typer) -> None:
    app.command("eval", help=EXAMPLES)(eval_command)


def eval_command(
    folder: RecursiveArgument,
    tasks: Annotated[list[str], typer.Option("--tasks", help="A task of lm-eval (repeatable).", show_default=False)],
    depth: Annotated[
        list[str] | None,
        typer.Option(
            "--depth",
            help="Let every token exit after this recursion, 0 being the first; all runs them all (repeatable). "
            "[default: all]",
            show_default=False,
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with tasks of your own.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", help="Solved examples in the prompt. [default: the task's]", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Samples of each task at most.", min=1, show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences at a time.", min=1)] = 8,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Score the dense model that it was made from, too.")
    ] = True,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Put the figures into recursify.json.")] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    from recursify.evaluation.tasks import evaluate_tasks

    with progress_report() as progress:
        results = evaluate_tasks(
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
    if json:
        print_json(results.to_dict())
        return
    print_data(_table(results.entries, results.depths))


def _read_depth(text: str) -> int | None:
    if text == FULL_DEPTH:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is neither a depth nor {FULL_DEPTH}", param_hint="--depth") from error


def _table(entries: list[dict[str, Any]], depths: list[int | None]) -> str:
    """One line per task and metric, a column per depth, the dense model last."""
    from recursify.evaluation.tasks import format_score

    lines: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        lines.setdefault((entry["name"], entry["metric"]), []).append(format_score(entry["value"], entry["stderr"]))
    for entry in entries[: len(lines)]:
        dense = "–" if entry["dense_value"] is None else format_score(entry["dense_value"], entry["dense_stderr"])
        lines[entry["name"], entry["metric"]].append(dense)
    names = ["full depth" if depth is None else f"depth {depth}" for depth in depths]
    rows = [[f"{task}, {metric}", *cells] for (task, metric), cells in lines.items()]
    return format_table(["task", *names, "dense"], rows)
