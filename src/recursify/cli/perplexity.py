"""``recursify perplexity``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    AndersonOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RecursionsOption,
    ResidualScaleOption,
    TrustOption,
    check_recursions,
)
from .report import print_data, print_json, progress_report

EXAMPLES = """
Perplexity of a recursive or dense model on a text, and beside a control on the same tokens.

**Examples**

`recursify perplexity smollm2-r2`

`recursify perplexity smollm2-r2 --data notes.md --against smollm2-135m`

`recursify perplexity smollm2-r2 --recursions 3 --residual-scale 1`

`recursify perplexity smollm2-135m --data chats.jsonl --max-tokens 20000 --json`
"""


def register(app: typer.Typer) -> None:
    app.command("perplexity", help=EXAMPLES)(perplexity_command)


def perplexity_command(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Text to measure on (txt, md, jsonl, parquet, or a folder; repeatable). "
            "[default: Python's help topics that calibration does not use]",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="A control to measure beside it.", show_default=False)
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth", help="Let every token exit after this recursion, 0 being the first.", min=0, show_default=False
        ),
    ] = None,
    recursions: RecursionsOption = None,
    residual_scale: ResidualScaleOption = None,
    anderson: AndersonOption = 0,
    length: Annotated[int, typer.Option("--length", help="Tokens per window.", min=2)] = 512,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Stop after this many.", min=2, show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    from recursify.evaluation.evaluate import evaluate_model

    check_recursions(recursions, residual_scale, anderson)
    if depth is not None and recursions is not None:
        raise typer.BadParameter("an exit of --depth is one of the model's own recursions", param_hint="--recursions")
    with progress_report() as progress:
        result = evaluate_model(
            model,
            against=against,
            data=data,
            length=length,
            max_tokens=max_tokens,
            depth=depth,
            recursions=recursions,
            residual_scale=residual_scale,
            anderson=anderson,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json:
        print_json(result.to_dict())
        return
    if result.control is None:
        print_data(f"perplexity {result.perplexity:,.3f} on {result.num_tokens:,} tokens of {result.text}")
        return
    print_data(
        f"perplexity {result.perplexity:,.3f}, {against} {result.control.perplexity:,.3f}, on "
        f"{result.num_tokens:,} tokens of {result.text}\n"
        f"same first choice {result.agreement:.1%}, KL to {against} {result.kl:.4f} nats"
    )
