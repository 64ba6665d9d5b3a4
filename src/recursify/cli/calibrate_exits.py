"""``recursify calibrate-exits``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import recursify
from recursify import ExitCalibrationSettings

from .from_settings import options_from_settings
from .options import DeviceOptions, JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

HELP = """
Choose the thresholds of an exit policy for a target agreement with the full model, on your own text.

They are stored in `config.json`, where `recursify generate DIR --exit POLICY` and `generate(exit_policy=POLICY)` find
them. They are chosen on the first half of the text and reported on the second.

**Examples**

`recursify calibrate-exits smollm2-exits --target-agreement 0.95`

`recursify calibrate-exits smollm2-exits --policy confidence --data notes/ --plot curve.png --dry-run`
"""


@options_from_settings
def command(
    folder: RecursiveArgument,
    loading: DeviceOptions,
    settings: ExitCalibrationSettings,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw agreement against mean depth (.png, .svg).", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the figures and change nothing.")] = False,
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        result = recursify.calibrate_exits(
            folder, settings=settings, dry_run=dry_run, progress=progress, **vars(loading)
        )
    if plot is not None:
        result.plot(plot)
    if json:
        print_json(result.to_dict())
        return
    following = f'next        recursify generate {folder} "…" --exit {result.policy}'
    print_data(f"{_summary(result)}\n\n{'nothing was changed' if dry_run else following}")


def _summary(result: recursify.ExitCalibration) -> str:
    outcome = result.held_out
    rows = [
        [
            f"{point.target:g}",
            f"{point.agreement:.1%}",
            f"{point.mean_depth:.2f}",
            " ".join(f"{fraction:.0%}" for fraction in point.exit_fractions),
        ]
        for point in sorted([*result.curve, outcome], key=lambda point: point.target)
    ]
    vocabulary = f", scoring {result.vocabulary:,} vocabulary entries" if result.vocabulary else ""
    return "\n".join(
        [
            f"thresholds  {', '.join(f'{value:.4g}' for value in outcome.thresholds)} for policy {result.policy}"
            + vocabulary,
            f"agreement   {outcome.agreement:.1%} on {result.num_tokens:,} held-out tokens of {result.text} "
            f"(target: {outcome.target:.1%})",
            f"mean depth  {outcome.mean_depth:.2f} of {len(outcome.thresholds)}",
            "",
            format_table(["target", "agreement", "mean depth", "tokens per exit"], rows),
        ]
    )
