"""``recursify export``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import JsonOption, OutputOption, OverwriteOption, RecursiveArgument
from .report import print_data, print_json, progress_report

EXAMPLES = """
Write a recursive model for stock tools: no remote code, fixed depth.

`dense` unrolls the recursion and merges each depth's LoRA: a checkpoint of the dense family for vLLM, llama.cpp,
quantizers; as large as the dense model.

`peft` writes the shared layers as a stock model, and a stock LoRA adapter that repeats them (cycle sharing only).

**Examples**

`recursify export smollm2-r2 -o smollm2-unrolled --format dense`

`recursify export llama-cycle -o llama-peft --format peft`
"""


def register(app: typer.Typer) -> None:
    app.command("export", help=EXAMPLES)(export_command)


def export_command(
    folder: RecursiveArgument,
    output: OutputOption,
    form: Annotated[str, typer.Option("--format", help="dense or peft.")] = "dense",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare logits when done.")] = True,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    from recursify.convert.export import export_model

    with progress_report() as progress:
        result = export_model(folder, output, format=form, check=check, overwrite=overwrite, progress=progress)
    if json:
        print_json(result.to_dict())
        return
    lines = [f"wrote {output}: {result.architecture}, {result.num_bytes / 1e6:,.1f} MB"]
    if result.left_out:
        lines.append(f"left out: {result.left_out}, which a stock model does not have")
    if result.max_logit_difference is not None:
        lines.append(f"logits differ from {folder} by at most {result.max_logit_difference:.2g}")
    print_data("\n".join(lines))
