"""``recursify export``."""

from __future__ import annotations

from typing import Annotated

import typer

import recursify

from .options import CheckOption, JsonOption, OutputOption, OverwriteOption, RecursiveArgument
from .report import print_data, print_json, progress_report

HELP = """
Write a recursive model for stock libraries: no remote code, fixed depth.

`dense` unrolls the recursion and merges each depth's LoRA into a checkpoint of the dense family, for vLLM, llama.cpp
and quantizers; it is as large as the dense model.

`peft` writes the shared layers as a stock model, and a stock LoRA adapter that repeats them (cycle sharing only).

**Examples**

`recursify export smollm2-r2 -o smollm2-unrolled --format dense`

`recursify export llama-cycle -o llama-peft --format peft`
"""


def command(
    folder: RecursiveArgument,
    output: OutputOption,
    format: Annotated[str, typer.Option("--format", help="Format of the export: dense or peft.")] = "dense",
    check: CheckOption = True,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        result = recursify.export_model(
            folder, output, format=format, check=check, overwrite=overwrite, progress=progress
        )
    if json:
        print_json(result.to_dict())
        return
    lines = [f"wrote {output}: {result.architecture}, {result.num_bytes / 1e6:,.1f} MB"]
    if result.left_out:
        lines.append(f"not exported: {result.left_out}, which a stock model does not support")
    if result.max_logit_difference is not None:
        lines.append(f"logits differ from {folder} by at most {result.max_logit_difference:.2g}")
    print_data("\n".join(lines))
