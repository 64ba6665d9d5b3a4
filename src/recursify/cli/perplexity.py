"""``recursify perplexity``."""

from __future__ import annotations

from typing import Annotated

import typer

import recursify
from recursify import EvaluationSettings

from .from_settings import options_from_settings
from .options import JsonOption, LoadingOptions, ModelArgument
from .report import print_data, print_json, progress_report

HELP = """
Measure the perplexity of a recursive or dense model on a text, alone or against another model on the same tokens.

**Examples**

`recursify perplexity smollm2-r2`

`recursify perplexity smollm2-r2 --data notes.md --against smollm2-135m`

`recursify perplexity smollm2-r2 --recursions 3 --residual-scale 1`

`recursify perplexity smollm2-135m --data chats.jsonl --max-tokens 20000 --json`
"""


@options_from_settings
def command(
    model: ModelArgument,
    loading: LoadingOptions,
    settings: EvaluationSettings,
    against: Annotated[
        str | None, typer.Option("--against", help="Model to compare with on the same tokens.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        result = recursify.evaluate_model(model, against=against, settings=settings, **vars(loading), progress=progress)
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
