"""``recursify perplexity``."""

from __future__ import annotations

from typing import Annotated, Any

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
    from recursify.evaluation.perplexity import measure
    from recursify.evaluation.text import default_text, read_text, token_windows

    from .models import load_model, require_exit, with_recursions

    check_recursions(recursions, residual_scale, anderson)
    if depth is not None and recursions is not None:
        raise typer.BadParameter("an exit of --depth is one of the model's own recursions", param_hint="--recursions")
    text = read_text(data) if data else default_text("held_out")
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loaded = with_recursions(loaded, model, recursions, residual_scale, anderson)
    if depth is not None:
        require_exit(loaded.config, model, depth)
    windows = token_windows(tokenizer, text, length, max_tokens=max_tokens)
    control = None
    if against is not None:
        control, _ = load_model(against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with progress_report() as progress:
        result = measure(loaded, windows, control, depth=depth, progress=progress)
    facts: dict[str, Any] = {"text": text.name, "window": length, "depth": depth, **result.to_dict()}
    if recursions is not None:
        chosen = {"recursions": recursions, "residual_scale": loaded.config.residual_scale, "anderson": anderson}
        facts = {**chosen, **facts}
    if json:
        print_json(facts)
        return
    if control is None:
        print_data(f"perplexity {facts['perplexity']:,.3f} on {facts['num_tokens']:,} tokens of {text.name}")
        return
    print_data(
        f"perplexity {facts['model']['perplexity']:,.3f}, {against} {facts['control']['perplexity']:,.3f}, on "
        f"{facts['model']['num_tokens']:,} tokens of {text.name}\n"
        f"same first choice {facts['top1_agreement']:.1%}, KL to {against} {facts['kl']:.4f} nats"
    )
