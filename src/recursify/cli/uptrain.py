"""``recursify uptrain``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import JsonOption, OutputOption, OverwriteOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

EXAMPLES = """
Train a recursive model on your own data.

A run that was killed goes on where it was with the same command and `--resume`.

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


def register(app: typer.Typer) -> None:
    app.command("uptrain", help=EXAMPLES)(uptrain_command)


def uptrain_command(
    model: RecursiveArgument,
    output: OutputOption,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            help="heal: the whole model, by cross-entropy and distillation. layers: each shared layer by itself, "
            "fitted to the dense layers' outputs in bounded memory. tie: heal, starting from the dense layers and "
            "letting them become one. exits: heads after every recursion. routers: heal, with routers that say which "
            "tokens go through which recursions. "
            "[default: heal]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Text, JSONL, Parquet or CSV files, folders of them, or Hub data sets (repeatable). "
            "[default: Python's own help topics]",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data", help="Held-out text (repeatable). [default: a part of the data]", show_default=False
        ),
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows as they are needed.")] = False,
    completions_only: Annotated[
        bool, typer.Option("--completions-only", help="Learn completions and what the assistant says, nothing else.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Tokens to train on. [default: 1000000]", show_default=False),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens per sequence. [default: 512]", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Sequences per device and micro-batch. [default: 4]", show_default=False),
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option("--accumulate", help="Micro-batches per step. [default: 1]", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak. [default: 1e-4]", show_default=False)
    ] = None,
    trainable: Annotated[
        str | None,
        typer.Option(
            "--trainable", help="What is trained: all, lora, shared, heads, routers. [default: all]", show_default=False
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", help="Dense model to distil from. [default: the one it was made from]", show_default=False
        ),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option("--kl-weight", help="Weight of the distillation; 0 for none. [default: 1]", show_default=False),
    ] = None,
    ce_weight: Annotated[
        float | None,
        typer.Option("--ce-weight", help="Weight of the cross-entropy. [default: 1]", show_default=False),
    ] = None,
    exit_head: Annotated[
        str | None,
        typer.Option(
            "--exit-head", help="Of an exit: shared, norm, low_rank, full. [default: shared]", show_default=False
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option("--router", help="expert_choice, token_choice. [default: expert_choice]", show_default=False),
    ] = None,
    capacity: Annotated[
        list[float] | None,
        typer.Option(
            "--capacity",
            help="With expert_choice: part of the tokens that goes into a recursion, once for each (repeatable). "
            "[default: evenly falling]",
            show_default=False,
        ),
    ] = None,
    router_kv: Annotated[
        str | None,
        typer.Option(
            "--router-kv",
            help="Keys that a recursion attends to: recursion_wise (its own), shared (the first one's). "
            "[default: recursion_wise]",
            show_default=False,
        ),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", help="Steps between evaluations. [default: 100]", show_default=False)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", help="Steps between checkpoints. [default: 100]", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")
    ] = False,
    sharding: Annotated[
        str | None,
        typer.Option(
            "--sharding",
            help="What several processes share out: none, fsdp2 (weights, gradients, optimizer), zero2 (gradients, "
            "optimizer; needs deepspeed). [default: none]",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="Of matrix products: auto, float32, bfloat16. [default: auto, bfloat16 where a GPU has it]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of everything random. [default: 0]", show_default=False)
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", help="tensorboard, trackio, wandb, ... (repeatable)", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML with any of these settings and more; flags win.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", help="Start so many on this machine.", min=1, show_default=False)
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    if resume and overwrite:
        raise typer.BadParameter("give --resume or --overwrite, not both", param_hint="--resume")
    flags = {
        "stage": stage,
        "data": data,
        "eval_data": eval_data,
        "streaming": streaming or None,
        "completions_only": completions_only or None,
        "max_tokens": max_tokens,
        "length": length,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "trainable": trainable,
        "teacher": teacher,
        "kl_weight": kl_weight,
        "ce_weight": ce_weight,
        "exit_head": exit_head,
        "router": router,
        "router_capacities": capacity or None,
        "router_kv": router_kv,
        "eval_every": eval_every,
        "save_every": save_every,
        "gradient_checkpointing": gradient_checkpointing or None,
        "sharding": sharding,
        "precision": precision,
        "seed": seed,
        "report_to": report_to,
    }
    from recursify.settings import read_settings
    from recursify.uptrain.settings import UptrainSettings

    from .models import require_recursive

    require_recursive(model)
    given = {name: value for name, value in flags.items() if value is not None}
    from_file = read_settings(config) if config else {}
    settings = UptrainSettings.from_mapping({**from_file, **given}, str(config or "the settings"))
    from recursify.uptrain.launch import is_launched, is_main_process, launch
    from recursify.uptrain.run import check_settings, uptrain_model

    if num_processes is not None and not is_launched():
        check_settings(settings)
        launch(num_processes, ["-m", "recursify", *sys.argv[1:]])
        return

    from transformers.utils import logging

    logging.disable_progress_bar()
    with progress_report() as progress:
        result = uptrain_model(model, output, settings=settings, resume=resume, overwrite=overwrite, progress=progress)
    if not is_main_process():
        return
    facts = result.to_dict()
    if json:
        print_json(facts)
        return
    print_data(_summary(facts))


def _summary(facts: dict[str, Any]) -> str:
    """The held-out figures before and after, beside the dense model's where it taught."""
    after, before = facts["after"], facts["before"]
    rows = []
    for name, figures in (("before", before), ("after", after)):
        if figures:
            agreement = f"{figures['agreement']:.1%}" if "agreement" in figures else "–"
            kl = f"{figures['kl']:.3f}" if "kl" in figures else "–"
            rows.append([name, f"{figures['perplexity']:,.2f}", agreement, kl])
    if "dense_ce" in after:
        import math

        rows.append(["dense", f"{math.exp(after['dense_ce']):,.2f}", "100.0%", "0.000"])
    lines = [
        f"wrote {facts['output']} after {facts['tokens']:,} tokens in {facts['steps']:,} steps",
        "",
        format_table(["held-out", "perplexity", "same token", "KL"], rows),
        "",
        *_exit_summary(before, after),
        *_router_summary(after),
    ]
    if facts["curves"]:
        lines.append(f"curves      {facts['curves']}")
    lines.append(f'next        recursify generate {facts["output"]} "Once upon a time"')
    return "\n".join(lines)


def _exit_summary(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """The same by depth, agreement being with the last recursion; nothing where there are no exits."""
    rows = []
    for name, figures in (("before", before), ("after", after)):
        for depth in range(sum(key.startswith("perplexity_depth_") for key in figures)):
            right = f"{figures[key]:.1%}" if (key := f"test_accuracy_depth_{depth}") in figures else "–"
            agreement = f"{figures[f'agreement_depth_{depth}']:.1%}"
            rows.append([f"depth {depth}, {name}", f"{figures[f'perplexity_depth_{depth}']:,.2f}", agreement, right])
    if not rows:
        return []
    return [format_table(["exit after", "perplexity", "same as last", "test is right"], rows), ""]


def _router_summary(after: dict[str, float]) -> list[str]:
    """What each recursion takes of held-out text, routers deciding as in inference; nothing without routers."""
    depths = range(sum(key.startswith("load_depth_") for key in after))
    rows = []
    for depth in depths:
        right = f"{after[key]:.1%}" if (key := f"sampling_accuracy_depth_{depth}") in after else "–"
        rows.append([f"depth {depth}", f"{after[f'load_depth_{depth}']:.1%}", right])
    if not rows:
        return []
    mean = sum(after[f"load_depth_{depth}"] for depth in depths)
    table = format_table(["recursion", "of the tokens", "as the best k"], rows)
    return [table, "", f"recursions  {mean:.2f} per token, of {len(rows)}", ""]
