"""``recursify inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recursify.errors import OutputError, SettingsError

from .options import JsonOption, RecursiveArgument
from .report import print_data, print_json, talk

EXAMPLES = """
What a recursive model is: layout, unique and effective parameters, bytes, KV bytes per token, history.

**Examples**

`recursify inspect smollm2-r2`

`recursify inspect smollm2-r2 --json | jq .parameters`

`recursify inspect smollm2-r2 --plot layout.svg`
"""


def register(app: typer.Typer) -> None:
    app.command("inspect", help=EXAMPLES)(inspect_command)


def inspect_command(
    folder: RecursiveArgument,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the layout as an SVG.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    from recursify.checkpoint.description import draw_layout, inspect_model
    from recursify.checkpoint.layout_picture import draw_svg

    if plot is not None:
        _require_svg(plot)
    description = inspect_model(folder)
    facts = description.to_dict()
    if plot is not None:
        try:
            plot.write_text(draw_svg(facts), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"Cannot write '{plot}': {error.strerror}. Name another file for --plot.") from error
        talk.print(f"drew the layout in {plot}", markup=False)
    if json:
        print_json(facts)
        return
    parameters = facts["parameters"]
    exits = facts["exits"]
    exit_line = "none"
    if exits:
        depths = ", ".join(map(str, exits["depths"]))
        exit_line = f"after depth {depths}: {exits['head']} head{', through the coda' if exits['through_coda'] else ''}"
    routing = facts["routing"]
    router_line = "none"
    if routing:
        loads = ", ".join(f"{capacity:.0%}" for capacity in routing["capacities"] or ())
        taken = f", which take {loads} of the tokens" if loads else ""
        router_line = f"{routing['router']}{taken}; keys and values {routing['kv']}, gate {routing['gate']}"
    made = ", ".join(str(facts[key]) for key in ("initialization", "relaxation") if facts[key])
    print_data(
        "\n".join(
            [
                draw_layout(description.layout),
                f"family    {facts['family']}, made from {facts['made_from'] or 'unknown'} ({made or 'unknown'})",
                f"stored    {parameters['stored'] / 1e6:,.1f}M parameters, {facts['bytes'] / 1e6:,.1f} MB of "
                f"{facts['dtype']}; {parameters['shared'] / 1e6:,.1f}M shared, "
                f"{parameters['residuals'] / 1e6:,.1f}M LoRA",
                f"runs as   {parameters['effective'] / 1e6:,.1f}M parameters, "
                f"{facts['layout']['effective_layers']} layers",
                f"KV cache  {facts['kv_bytes_per_token']:,} bytes per token",
                f"LoRA      rank {facts['lora_rank']}"
                + (f", {len(facts['lora_rank_pattern'])} of its own" if facts["lora_rank_pattern"] else ""),
                f"exits     {exit_line}",
                f"routers   {router_line}",
                f"history   {len(facts['history'])} uptraining runs",
            ]
        )
    )


def _require_svg(file: Path) -> None:
    """Raises:
    SettingsError: ``file`` is not named ``.svg``, or its folder is not there.
    """
    if file.suffix.lower() != ".svg":
        raise SettingsError(f"--plot draws an SVG, so it cannot write '{file}'. Name a file that ends in .svg.")
    if not file.parent.is_dir():
        raise SettingsError(f"--plot cannot write '{file}': there is no folder '{file.parent}'. Make it first.")
