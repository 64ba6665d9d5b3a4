"""``recursify calibrate-exits``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    from recursify.evaluation.exit_calibration import calibrate_exits, draw_curve

    with progress_report() as progress:
        calibration = calibrate_exits(
            folder,
            policy=policy,
            target_agreement=target,
            data=data,
            vocabulary=vocabulary,
            length=length,
            max_tokens=max_tokens,
            dry_run=dry_run,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if plot is not None:
        draw_curve(calibration, plot)
    if json:
        print_json(calibration.to_dict())
        return
    held_out = calibration.held_out
    rows = [
        [
            f"{outcome.target:g}",
            f"{outcome.agreement:.1%}",
            f"{outcome.mean_depth:.2f}",
            " ".join(f"{fraction:.0%}" for fraction in outcome.exit_fractions),
        ]
        for outcome in sorted([*calibration.curve, held_out], key=lambda outcome: outcome.target)
    ]
    print_data(
        "\n".join(
            [
                f"thresholds  {', '.join(f'{value:.4g}' for value in held_out.thresholds)} for policy {policy}"
                + (f", by {vocabulary:,} entries of the vocabulary" if vocabulary else ""),
                f"agreement   {held_out.agreement:.1%} on {calibration.num_tokens:,} held-out tokens of "
                f"{calibration.text} (target: {target:.1%})",
                f"mean depth  {held_out.mean_depth:.2f} of {len(held_out.thresholds)}",
                "",
                format_table(["target", "agreement", "mean depth", "exits per depth"], rows),
                "",
                "nothing was changed" if dry_run else f'next        recursify generate {folder} "…" --exit {policy}',
            ]
        )
    )
