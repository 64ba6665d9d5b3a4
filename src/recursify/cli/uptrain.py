"""``recursify uptrain``."""

from __future__ import annotations

import math
import sys
from typing import Annotated

import typer

import recursify
from recursify import UptrainSettings

from .from_settings import options_from_settings
from .options import JsonOption, OutputOption, OverwriteOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

HELP = """
Train a recursive model on your own data.

To resume an interrupted run, repeat its command with `--resume`.

**Examples**

`recursify uptrain smollm2-r2 -o smollm2-healed --max-tokens 30000`

`recursify uptrain smollm2-r2 -o healed --data notes/ --data chats.jsonl --completions-only --max-tokens 5000000`

`recursify uptrain smollm2-healed -o smollm2-exits --stage exits --max-tokens 30000`

`recursify uptrain smollm2-healed -o smollm2-routed --stage routers --capacity 1 --capacity 0.5 --max-tokens 30000`

`recursify uptrain qwen-r4 -o healed --data roneneldan/TinyStories --streaming --eval-data held_out.txt`

`recursify uptrain llama-r2 -o healed --stage layers --data corpus/ --max-tokens 100000`

`recursify uptrain smollm2-r2 -o smollm2-tied --stage tie --max-tokens 30000`

`recursify uptrain llama-r2 -o healed --data corpus/ --num-processes 4 --sharding fsdp2 --config uptrain.yaml`

`accelerate launch -m recursify uptrain llama-r2 -o healed --data corpus/ --resume`
"""


@options_from_settings
def command(
    model: RecursiveArgument,
    output: OutputOption,
    settings: UptrainSettings,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the output folder.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", help="Number of local processes to launch.", min=1, show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    if resume and overwrite:
        raise typer.BadParameter("give --resume or --overwrite, not both", param_hint="--resume")
    from recursify.uptrain.launch import is_launched, is_main_process, launch

    if num_processes is not None and not is_launched():
        launch(num_processes, ["-m", "recursify", *sys.argv[1:]], settings)
        return

    from transformers.utils import logging

    logging.disable_progress_bar()
    with progress_report() as progress:
        result = recursify.uptrain_model(
            model, output, settings=settings, resume=resume, overwrite=overwrite, progress=progress
        )
    if is_main_process():
        print_json(result.to_dict()) if json else print_data(_summary(result))


def _summary(result: recursify.UptrainResult) -> str:
    """Held-out figures before and after, next to those of the dense teacher."""
    before, after = result.before, result.after
    rows = []
    for name, figures in (("before", before), ("after", after)):
        if figures:
            agreement = f"{figures['agreement']:.1%}" if "agreement" in figures else "–"
            kl = f"{figures['kl']:.3f}" if "kl" in figures else "–"
            rows.append([name, f"{figures['perplexity']:,.2f}", agreement, kl])
    if "dense_ce" in after:
        rows.append(["dense", f"{math.exp(after['dense_ce']):,.2f}", "100.0%", "0.000"])
    lines = [
        f"wrote {result.output} after {result.tokens:,} tokens in {result.steps:,} steps",
        "",
        format_table(["held-out", "perplexity", "same argmax", "KL"], rows),
        "",
        *_exit_summary(before, after),
        *_router_summary(after),
    ]
    if result.curves:
        lines.append(f"curves      {result.curves}")
    lines.append(f'next        recursify generate {result.output} "Once upon a time"')
    return "\n".join(lines)


def _exit_summary(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Table of held-out figures per exit; empty without exits."""
    rows = []
    for name, figures in (("before", before), ("after", after)):
        for depth in range(sum(key.startswith("perplexity_depth_") for key in figures)):
            accuracy = f"{figures[key]:.1%}" if (key := f"test_accuracy_depth_{depth}") in figures else "–"
            agreement = f"{figures[f'agreement_depth_{depth}']:.1%}"
            perplexity = f"{figures[f'perplexity_depth_{depth}']:,.2f}"
            rows.append([f"depth {depth}, {name}", perplexity, agreement, accuracy])
    if not rows:
        return []
    return [format_table(["exit after", "perplexity", "same as last", "classifier accuracy"], rows), ""]


def _router_summary(after: dict[str, float]) -> list[str]:
    """Table of the load of every recursion on held-out text; empty without routers."""
    depths = range(sum(key.startswith("load_depth_") for key in after))
    rows = []
    for depth in depths:
        accuracy = f"{after[key]:.1%}" if (key := f"sampling_accuracy_depth_{depth}") in after else "–"
        rows.append([f"depth {depth}", f"{after[f'load_depth_{depth}']:.1%}", accuracy])
    if not rows:
        return []
    mean = sum(after[f"load_depth_{depth}"] for depth in depths)
    table = format_table(["recursion", "tokens", "top-k accuracy"], rows)
    return [table, "", f"recursions  {mean:.2f} per token, of {len(rows)}", ""]
