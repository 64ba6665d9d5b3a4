"""``recursify generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import recursify
from recursify import GenerationSettings
from recursify.errors import SettingsError

from .depth_view import DepthView
from .from_settings import options_from_settings
from .options import JsonOption, LoadingOptions, ModelArgument
from .report import print_data, print_json, print_styled, talk

HELP = """
Continue a prompt with a recursive (or dense) model. The prompt is an argument, or standard input.

**Examples**

`recursify generate smollm2-r2 "Once upon a time"`

`recursify generate smollm2-r2 "What is a recursion?" --chat --max-new-tokens 80`

`recursify generate smollm2-exits "Once upon a time" --exit head --threshold 0.9 --stats`

`recursify generate smollm2-exits "Once upon a time" --speculate --stats`

`recursify generate smollm2-r2 "Once upon a time" --recursions 3`

`recursify generate smollm2-routed "Once upon a time" --show-depth --depth-page depths.html`

`echo "def fibonacci(n):" | recursify generate smollm2-r2 --temperature 0.7 --seed 1 --stats`
"""


@options_from_settings
def command(
    model: ModelArgument,
    loading: LoadingOptions,
    settings: GenerationSettings,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; standard input if omitted.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the number of tokens per exit (.png, .svg).", show_default=False)
    ] = None,
    show_depth: Annotated[
        bool, typer.Option("--show-depth", help="Colour each token by its depth. With --json, depths are listed.")
    ] = False,
    depth_page: Annotated[
        Path | None,
        typer.Option("--depth-page", metavar="FILE", help="Write the coloured text as HTML.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    prompt = _read(prompt)
    shows_depth = show_depth or depth_page is not None
    if plot is not None and settings.exit_policy is None:
        raise typer.BadParameter("requires --exit", param_hint="--plot")
    if settings.speculate and shows_depth:
        raise typer.BadParameter("cannot be combined with --show-depth", param_hint="--speculate")
    result = recursify.generate_text(model, prompt, settings=settings, **vars(loading))
    if plot is not None:
        result.plot(plot)
    shown = "" if settings.chat else prompt.rstrip("\n")
    view = _depth_view(result, model, shown) if shows_depth else None
    if view is not None and depth_page is not None:
        view.write_page(depth_page)
        talk.print(f"wrote the depths of tokens to {depth_page}", markup=False)
    if json:
        print_json(result.to_dict())
        return
    if view is not None and show_depth:
        print_styled(view.for_terminal())
    else:
        print_data(shown + result.text)
    if settings.measure:
        talk.print(_statistics(result, settings.exit_policy))


def _read(prompt: str | None) -> str:
    """Prompt, from standard input if it is None."""
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("give a prompt as an argument or on standard input", param_hint="PROMPT")
    return prompt


def _depth_view(result: recursify.GenerationResult, model: str, prompt: str) -> DepthView:
    if result.depths is None:
        raise SettingsError(f"'{model}' is a dense model, and this needs a recursive one. Convert it first.")
    return DepthView(prompt, result.tokens, result.depths, result.num_depths)


def _statistics(result: recursify.GenerationResult, policy: str | None) -> str:
    """Speed, drafts and exits, for a person."""
    lines = [f"{result.num_tokens} tokens in {result.seconds:.2f} s, {result.speed:.2f} tokens/s"]
    if result.plain_speed is not None:
        lines[0] += f"; {result.plain_speed:.2f} at full depth"
    if result.drafted is not None:
        lines.append(f"drafts     {result.accepted} of {result.drafted} accepted")
    if policy is None and result.depths:
        lines.append(f"recursions {1 + sum(result.depths) / len(result.depths):.2f} per token")
    if result.exits is not None:
        exits = result.exits
        *early, full = exits.histogram
        counts = ", ".join(f"{count} after depth {depth}" for depth, count in enumerate(early))
        lines.append(f"exits      {counts}; {full} ran all layers")
        lines.append(
            f"layers     {exits.mean_layers:.1f} of {exits.num_layers} per token, in {exits.block_calls} calls"
        )
        if exits.agreement is not None:
            lines.append(f"agreement  {exits.agreement:.1%} of tokens are the full model's argmax")
        if result.simulated:
            lines.append(f"simulated  policy '{policy}' runs all layers to find where tokens could have exited")
    return "\n".join(lines)
