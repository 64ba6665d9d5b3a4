"""``recursify calibrate-exits``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DeviceOption, DtypeOption, JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

EXAMPLES = """
Choose the thresholds of an exit policy for the agreement that you want, on your own text.

They go into `config.json`, where `recursify generate DIR --exit POLICY` and `generate(exit_policy=POLICY)` find them.
They are chosen on the first half of the text; the figures are those of the second.

**Examples**

`recursify calibrate-exits smollm2-exits --target-agreement 0.95`

`recursify calibrate-exits smollm2-exits --policy confidence --data notes/ --plot curve.png --dry-run`
"""


def register(app: typer.Typer) -> None:
    app.command("calibrate-exits", help=EXAMPLES)(calibrate_exits_command)


def calibrate_exits_command(
    folder: RecursiveArgument,
    policy: Annotated[
        str,
        typer.Option("--policy", help="head, confidence, entropy, saturation, convergence or divergence."),
    ] = "head",
    target: Annotated[
        float,
        typer.Option("--target-agreement", help="Part of tokens that shall say what the last recursion says."),
    ] = 0.95,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Text (txt, md, jsonl, parquet, or a folder; repeatable). [default: Python's help topics]",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            "--vocabulary",
            help="Judge by so many entries of the vocabulary, the first and most frequent, instead of all.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens per window.", min=2)] = 256,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Stop after this many.", min=2)] = 16384,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw agreement against mean depth (.png, .svg).", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the figures and change nothing.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    from recursify.checkpoint.record import update_record
    from recursify.evaluation.exit_calibration import calibrate_exits, draw_curve
    from recursify.evaluation.text import default_text, read_text, token_windows

    from .models import load_model, require_recursive

    require_recursive(folder)
    text = read_text(data) if data else default_text("held_out")
    model, tokenizer = load_model(str(folder), dtype=dtype, device=device)
    windows = token_windows(tokenizer, text, length, max_tokens=max_tokens)
    with progress_report() as progress:
        found = calibrate_exits(model, windows, policy, target, vocabulary=vocabulary, progress=progress)
    if plot is not None:
        draw_curve(found, plot)
    facts: dict[str, Any] = {"text": text.name, "vocabulary": vocabulary, **found.to_dict()}
    if not dry_run:
        model.config.exit_policy, model.config.exit_thresholds = policy, found.chosen.thresholds
        model.config.exit_vocabulary = vocabulary
        model.config.save_pretrained(folder)
        update_record(folder, exit_calibration=facts)
    if json:
        print_json(facts)
        return
    outcome = found.held_out
    rows = [
        [
            f"{each.target:g}",
            f"{each.agreement:.1%}",
            f"{each.mean_depth:.2f}",
            " ".join(_part(p) for p in each.leaving),
        ]
        for each in sorted([*found.curve, outcome], key=lambda each: each.target)
    ]
    print_data(
        "\n".join(
            [
                f"thresholds  {', '.join(f'{value:.4g}' for value in outcome.thresholds)} for policy {policy}"
                + (f", by {vocabulary:,} entries of the vocabulary" if vocabulary else ""),
                f"agreement   {outcome.agreement:.1%} on {found.num_tokens:,} tokens of {text.name} that they were not "
                f"chosen by (asked: {target:.1%})",
                f"mean depth  {outcome.mean_depth:.2f} of {len(outcome.thresholds)}",
                "",
                format_table(["target", "agreement", "mean depth", "leaving by exit"], rows),
                "",
                "nothing was changed" if dry_run else f'next        recursify generate {folder} "…" --exit {policy}',
            ]
        )
    )


def _part(value: float) -> str:
    return f"{value:.0%}"
