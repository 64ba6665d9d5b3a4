"""``recursify bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DeviceOption, DtypeOption, JsonOption, ModelArgument, TrustOption
from .report import format_table, print_data, print_json, progress_report, talk

HELP = """
Measure how fast a model answers many requests: by the engine at full depth, with tokens that leave early, with rows
that wait for one another, by transformers' `generate` and `generate_batch`, and the dense model beside it. All get
the same requests, in turns, in one process; ratios are what counts.

**Examples**

`recursify bench smollm2-exits --dense smollm2-135m --concurrency 1 --concurrency 8`

`recursify bench smollm2-r2 --forced 0.5 --forced 0.5 --even --json`

`recursify bench smollm2-exits --exit confidence --threshold 0.6 --plot bench.png`
"""


def command(
    model: ModelArgument,
    dense: Annotated[
        str | None, typer.Option("--dense", help="The dense model, as a control.", show_default=False)
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option("--concurrency", help="Requests at once; several times. [default: 1, 8]", min=1)
    ] = None,
    requests: Annotated[
        int, typer.Option("--requests", help="Requests per place: so many times as run at once.", min=1)
    ] = 3,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the longest prompt.", min=2)] = 32,
    new: Annotated[int, typer.Option("--new", help="Tokens of an answer, on average.", min=2)] = 32,
    even: Annotated[bool, typer.Option("--even", help="All prompts and answers of the same length.")] = False,
    forced: Annotated[
        list[float] | None,
        typer.Option(
            "--forced",
            help="Parts of the tokens that leave after each recursion, once per recursion. [default: all parts alike]",
            show_default=False,
        ),
    ] = None,
    kv: Annotated[
        str, typer.Option("--kv", help="Keys and values of what forced exits skip: latest, copied, deferred.")
    ] = "latest",
    exit_policy: Annotated[
        str | None, typer.Option("--exit", help="Also let tokens leave by this policy.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Of that policy. [default: as calibrated]", show_default=False)
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also leave where an oracle would, which is a simulation.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also generate with a static cache and a compiled forward.")
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", help="Runs of each that count.", min=1)] = 3,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of the CPU; with 1, its time is measured.", min=1)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw tokens per second (.png, .svg).", show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

    from recursify.bench.plan import BenchPlan, draw_speeds
    from recursify.checkpoint.loading import load_model

    loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_model(model, **loading)
    control = None if dense is None else load_model(dense, **loading)[0]
    plan = BenchPlan(
        loaded,
        tokenizer,
        dense=control,
        concurrency=tuple(concurrency or (1, 8)),
        requests=requests,
        prompt=prompt,
        new=new,
        even=even,
        forced=tuple(forced) if forced else None,
        kv=kv,
        exit_policy=exit_policy,
        threshold=threshold,
        oracle=oracle,
        compiled=compiled,
        rounds=rounds,
    )
    with progress_report() as progress:
        facts = plan.run(progress)
    if plot is not None:
        draw_speeds(facts, plot)
        talk.print(f"wrote {plot}")
    if json:
        print_json(facts)
    else:
        print_data(_table(facts))


def _table(facts: dict[str, Any]) -> str:
    from recursify.bench.plan import FIGURES, figures_of, ideals_of, name_of

    head = ["", "at once", *FIGURES, "G", "G*", "G* per call", "η"]
    lines = [[name_of(row), str(row["concurrency"]), *figures_of(row), *ideals_of(row)] for row in facts["rows"]]
    notes = (
        f"{facts['clock']}; {facts['device']}, {facts['dtype']}, {facts['threads']} threads; median of "
        f"{facts['rounds']} rounds in turns. × is to generate with as many at once. G is the gain over the engine at "
        f"full depth without prompts, G* the most that the costs of the parts allow, if they follow the rows, and per "
        f"call, if they do not; η = G / G*."
    )
    return format_table(head, lines) + "\n\n" + notes
