"""``recursify calibrate-exits``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import recursify

from .options import DataOption, DeviceOption, DtypeOption, JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

HELP = """
Choose the thresholds of an exit policy for a target agreement with the full model, on your own text.

They are stored in `config.json`, where `recursify generate DIR --exit POLICY` and `generate(exit_policy=POLICY)` find
them. They are chosen on the first half of the text and reported on the second.

**Examples**

`recursify calibrate-exits smollm2-exits --target-agreement 0.95`

`recursify calibrate-exits smollm2-exits --policy confidence --data notes/ --plot curve.png --dry-run`
"""


def command(
    folder: RecursiveArgument,
    policy: Annotated[
        str,
        typer.Option("--policy", help="Exit policy: head, confidence, entropy, saturation, convergence or divergence."),
    ] = "head",
    target_agreement: Annotated[
        float,
        typer.Option(
            "--target-agreement",
            help="Target agreement: fraction of tokens whose exit prediction matches the full model.",
        ),
    ] = 0.95,
    data: DataOption = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            "--vocabulary",
            help="Score only the first (most frequent) N vocabulary entries. Without it, all.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens per window.", min=2)] = 256,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Maximum number of tokens.", min=2)] = 16384,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw agreement against mean depth (.png, .svg).", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the figures and change nothing.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        result = recursify.calibrate_exits(
            folder,
            policy=policy,
            target_agreement=target_agreement,
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
        result.plot(plot)
    if json:
        print_json(result.to_dict())
        return
    closing = "nothing was changed" if dry_run else f'next        recursify generate {folder} "…" --exit {policy}'
    print_data(f"{_summary(result, target_agreement)}\n\n{closing}")


def _summary(result: recursify.ExitCalibration, target: float) -> str:
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
            f"(target: {target:.1%})",
            f"mean depth  {outcome.mean_depth:.2f} of {len(outcome.thresholds)}",
            "",
            format_table(["target", "agreement", "mean depth", "tokens per exit"], rows),
        ]
    )
