"""``recursify perplexity``."""

from __future__ import annotations

from typing import Annotated

import typer

import recursify

from .options import (
    AndersonOption,
    DataOption,
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

HELP = """
Measure the perplexity of a recursive or dense model on a text, alone or against another model on the same tokens.

**Examples**

`recursify perplexity smollm2-r2`

`recursify perplexity smollm2-r2 --data notes.md --against smollm2-135m`

`recursify perplexity smollm2-r2 --recursions 3 --residual-scale 1`

`recursify perplexity smollm2-135m --data chats.jsonl --max-tokens 20000 --json`
"""


def command(
    model: ModelArgument,
    data: DataOption = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Model to compare with on the same tokens.", show_default=False)
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth", help="Depth at which every token exits; 0 is the first recursion.", min=0, show_default=False
        ),
    ] = None,
    recursions: RecursionsOption = None,
    residual_scale: ResidualScaleOption = None,
    anderson: AndersonOption = 0,
    length: Annotated[int, typer.Option("--length", help="Tokens per window.", min=2)] = 512,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Maximum number of tokens.", min=2, show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    check_recursions(recursions, residual_scale, anderson)
    if depth is not None and recursions is not None:
        raise typer.BadParameter("--depth is one of the model's own recursions; give one of them", param_hint="--depth")
    with progress_report() as progress:
        result = recursify.evaluate_model(
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
    elif result.control is None:
        print_data(f"perplexity {result.perplexity:,.3f} on {result.num_tokens:,} tokens of {result.text}")
    else:
        print_data(
            f"perplexity {result.perplexity:,.3f}, {against} {result.control.perplexity:,.3f}, on "
            f"{result.num_tokens:,} tokens of {result.text}\n"
            f"same argmax {result.agreement:.1%}, KL to {against} {result.kl:.4f} nats"
        )
