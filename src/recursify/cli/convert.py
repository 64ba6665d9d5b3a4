"""``recursify convert``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import recursify
from recursify import ConversionSettings

from .from_settings import options_from_settings
from .options import CheckOption, JsonOption, ModelArgument, OverwriteOption, TrustOption
from .report import print_data, print_json, progress_report, talk

HELP = """
Convert a pretrained model into a recursive one.

**Examples**

`recursify convert smollm2-135m -o smollm2-r2 --prelude 4 --coda 4 --lora-rank 64`

`recursify convert ./Llama-3.2-1B -o llama-r2 --recursions 2 --sharing middle_cycle --dtype bfloat16`

`recursify convert ./Qwen3-0.6B -o qwen-r4 --recursions 4 --calibration-data notes.md --calibration-data chats.jsonl`

`recursify convert smollm2-135m -o smollm2-small --target-size 0.75`

`recursify convert Qwen/Qwen3-0.6B --recursions 4 --dry-run`
"""


@options_from_settings
def command(
    model: ModelArgument,
    settings: ConversionSettings,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.", show_default=False)
    ] = None,
    check: CheckOption = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted conversion into the output folder.")
    ] = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    source: dict[str, Any] = {"settings": settings, "revision": revision, "trust_remote_code": trust_remote_code}
    if dry_run:
        with progress_report() as progress:
            plan = recursify.plan_conversion(model, **source, progress=progress)
        costs = recursify.estimate_costs(plan, check=check)
        facts = {**plan.to_dict(), "costs": [asdict(cost) for cost in costs]}
        print_json(facts) if json else print_data(_text(plan, costs))
        return
    if output is None:
        raise typer.BadParameter("give the folder to write, or --dry-run", param_hint="--output / -o")
    with progress_report() as progress:

        def show(plan: recursify.ConversionPlan) -> None:
            talk.print(_text(plan, recursify.estimate_costs(plan, devices=[settings.device], check=check)))

        result = recursify.convert_model(
            model,
            output,
            **source,
            check=check,
            overwrite=overwrite,
            resume=resume,
            on_plan=None if json else show,
            progress=progress,
        )
    print_json(result.to_dict()) if json else print_data(_summary(result))


def _text(plan: recursify.ConversionPlan, costs: list[recursify.CostEstimate]) -> str:
    lines = [f"  {f'cost on {cost.device}':<15s} {cost}" for cost in costs]
    return "\n".join([str(plan), *lines])


def _summary(result: recursify.ConversionResult) -> str:
    lines = [f"wrote {result.output}"]
    if result.check is not None:
        comparison = result.check.comparison
        lines += [
            f"perplexity  {comparison.model.perplexity:,.2f} (dense {comparison.control.perplexity:,.2f}) on "
            f"{comparison.model.num_tokens:,} tokens of {result.check.text}",
            f"agreement   {comparison.top1_agreement:.1%} of argmax tokens, KL {comparison.kl:.3f} nats",
            f"sample      {result.check.sample!r}",
        ]
    lines.append(f'next        recursify generate {result.output} "Once upon a time"')
    return "\n".join(lines)
