"""``recursify plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import recursify
from recursify import ConversionSettings

from .from_settings import options_from_settings
from .options import JsonOption, ModelArgument, TrustOption
from .report import format_table, print_data, print_json, progress_report, talk

HELP = """
Predict which layout keeps most quality at which size: prelude, coda, recursions, order, and a rank for every kind of
map, from one measuring pass over the dense model. Nothing is written.

**Examples**

`recursify plan smollm2-135m`

`recursify plan smollm2-135m --target-size 0.75 --plot layouts.svg`

`recursify plan ./Qwen3-0.6B --target-parameters 400000000 --calibration-data notes.md --json`
"""


@options_from_settings
def command(
    model: ModelArgument,
    settings: ConversionSettings,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw perplexity over size (.png, .svg).", show_default=False),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    source: dict[str, Any] = {"settings": settings, "revision": revision, "trust_remote_code": trust_remote_code}
    with progress_report() as progress:
        plan = recursify.plan_layouts(model, **source, progress=progress)
    if plot is not None:
        plan.plot(plot)
        talk.print(f"drew the sizes in {plot}", markup=False)
    print_json(plan.to_dict()) if json else print_data(_summary(plan))


def _summary(plan: recursify.LayoutPlan) -> str:
    paths = list(plan.front[0].ranks) if plan.front else []
    header = ["layout", "order", "size", "parameters", *(path.rpartition(".")[2] for path in paths), "perplexity", ""]
    rows = [_row(choice, "Pareto") for choice in plan.front]
    if plan.default is not None:
        better = "" if plan.same_size is None else f"; {plan.same_size.perplexity:,.1f} at its size"
        rows.append(_row(plan.default, f"default{'; nothing beats it at its size' if plan.default_wins else better}"))
    if plan.chosen is not None:
        rows.append(_row(plan.chosen, "chosen"))
    lines = [
        format_table(header, rows),
        f"Ranks are by kind of map. Perplexity is predicted from {plan.num_tokens:,} tokens of {plan.text} (dense "
        f"{plan.perplexity:,.2f}).",
    ]
    if plan.chosen is not None:
        lines.append(f"next  recursify convert {plan.source} -o DIR --target-parameters {plan.chosen.num_parameters}")
    return "\n".join(lines)


def _row(choice: recursify.LayoutChoice, note: str) -> list[str]:
    figures = [choice.layout.order, f"{choice.size:.3f}", f"{choice.num_parameters / 1e6:,.1f}M"]
    return [str(choice.layout), *figures, *map(str, choice.ranks.values()), f"{choice.perplexity:,.1f}", note]
