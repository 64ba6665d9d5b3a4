"""``recursify convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, ModelArgument, OverwriteOption, TrustOption
from .report import print_data, print_json, progress_report, talk

if TYPE_CHECKING:
    from recursify.convert.pipeline import ConversionResult

EXAMPLES = """
Make a pretrained model recursive.

**Examples**

`recursify convert smollm2-135m -o smollm2-r2 --prelude 4 --coda 4 --lora-rank 64`

`recursify convert ./Llama-3.2-1B -o llama-r2 --recursions 2 --sharing middle_cycle --dtype bfloat16`

`recursify convert ./Qwen3-0.6B -o qwen-r4 --recursions 4 --calibration-data notes.md --calibration-data chats.jsonl`

`recursify convert Qwen/Qwen3-0.6B --recursions 4 --dry-run`
"""


def register(app: typer.Typer) -> None:
    app.command("convert", help=EXAMPLES)(convert_command)


def convert_command(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)] = None,
    recursions: Annotated[
        int | None,
        typer.Option("--recursions", help="How often the shared block runs. [default: 2]", show_default=False),
    ] = None,
    sharing: Annotated[
        str | None,
        typer.Option(
            "--sharing",
            help="cycle, sequence, middle_cycle, middle_sequence. [default: middle_cycle]",
            show_default=False,
        ),
    ] = None,
    prelude: Annotated[
        int | None, typer.Option("--prelude", help="Unshared layers before the block.", show_default=False)
    ] = None,
    coda: Annotated[
        int | None, typer.Option("--coda", help="Unshared layers after the block.", show_default=False)
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            help="Shared weights: auto, calibrated, average, stepwise, lower, upper, random_choice, random, fisher. "
            "[default: auto]",
            show_default=False,
        ),
    ] = None,
    lora_rank: Annotated[
        str | None,
        typer.Option(
            "--lora-rank", help="Rank of each depth's residual; 0 for none, or full. [default: 64]", show_default=False
        ),
    ] = None,
    relaxation: Annotated[
        str | None,
        typer.Option(
            "--relaxation", help="Residuals: auto, calibrated, svd, zero. [default: auto]", show_default=False
        ),
    ] = None,
    rank_allocation: Annotated[
        str | None,
        typer.Option(
            "--rank-allocation",
            help="uniform; tail or fisher: rank where it removes most error. [default: uniform]",
            show_default=False,
        ),
    ] = None,
    calibration_data: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration-data",
            help="Text to calibrate on (txt, md, jsonl, parquet, or a folder; repeatable), or none. "
            "[default: Python's own help topics]",
            show_default=False,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option("--calibration-tokens", help="How many tokens of it. [default: 16384]", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where dense layers run during calibration. [default: cpu]", show_default=False),
    ] = None,
    tie_norms: Annotated[bool, typer.Option("--tie-norms", help="One norm for all depths, as in the papers.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32, bfloat16, float16; auto keeps the model's. [default: auto]", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of everything random. [default: 0]", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="YAML with any of these settings, and per-module ranks; flags win.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with the dense model when done.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    if output is None and not dry_run:
        raise typer.BadParameter("give the folder to write, or --dry-run", param_hint="--output / -o")
    flags = {
        "num_recursions": recursions,
        "sharing": sharing,
        "num_prelude_layers": prelude,
        "num_coda_layers": coda,
        "initialization": init,
        "lora_rank": lora_rank,
        "relaxation": relaxation,
        "rank_allocation": rank_allocation,
        "calibration_data": None if calibration_data is None else [d for d in calibration_data if d != "none"],
        "calibration_tokens": calibration_tokens,
        "device": device,
        "tie_norms": tie_norms or None,
        "dtype": dtype,
        "seed": seed,
    }
    from recursify.convert.pipeline import ConversionPlan, convert_model, plan_conversion
    from recursify.convert.settings import ConversionSettings
    from recursify.settings import read_settings

    given = {name: value for name, value in flags.items() if value is not None}
    settings = ConversionSettings.from_mapping(
        {**(read_settings(config) if config else {}), **given}, str(config or "the settings")
    )
    common: dict[str, Any] = {
        "settings": settings, "revision": revision, "trust_remote_code": trust_remote_code
    }  # fmt: skip
    if dry_run:
        plan = plan_conversion(model, **common)
        if json:
            print_json(plan.to_dict())
        else:
            print_data(str(plan))
        return
    assert output is not None

    def show(plan: ConversionPlan) -> None:
        if not json:
            talk.print(str(plan))

    with progress_report() as progress:
        result = convert_model(
            model, output, **common, check=check, overwrite=overwrite, on_plan=show, progress=progress
        )
    if json:
        print_json(result.to_dict())
    else:
        print_data(_summary(result))


def _summary(result: ConversionResult) -> str:
    lines = [f"wrote {result.output}"]
    if result.check is not None:
        figures = result.check.comparison
        lines += [
            f"perplexity  {figures.model.perplexity:,.2f} (dense {figures.control.perplexity:,.2f}) on "
            f"{figures.model.num_tokens:,} tokens of {result.check.text}",
            f"agreement   {figures.top1_agreement:.1%} of first choices, KL {figures.kl:.3f} nats",
            f"sample      {result.check.sample!r}",
        ]
    lines.append(f'next        recursify generate {result.output} "Once upon a time"')
    return "\n".join(lines)
