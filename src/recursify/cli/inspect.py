"""``recursify inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import recursify

from .options import JsonOption, RecursiveArgument
from .report import print_data, print_json, talk

HELP = """
Show a recursive model: layout, stored and effective parameters, bytes, KV-cache bytes per token, history.

**Examples**

`recursify inspect smollm2-r2`

`recursify inspect smollm2-r2 --json | jq .parameters`

`recursify inspect smollm2-r2 --plot layout.svg`
"""


def command(
    folder: RecursiveArgument,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the layout (.png, .svg).", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    description = recursify.inspect_model(folder)
    if plot is not None:
        description.plot(plot)
        talk.print(f"drew the layout in {plot}", markup=False)
    print_json(description.to_dict()) if json else print_data(_summary(description))


def _summary(model: recursify.ModelDescription) -> str:
    parameters = model.parameters
    methods = ", ".join(name for name in (model.initialization, model.relaxation) if name)
    pattern = f", {len(model.lora_rank_pattern)} modules with their own" if model.lora_rank_pattern else ""
    lines = [
        model.layout_text(),
        f"family    {model.family}, converted from {model.made_from or 'unknown'} ({methods or 'unknown'})",
        f"stored    {parameters.stored / 1e6:,.1f}M parameters, {model.num_bytes / 1e6:,.1f} MB of {model.dtype}; "
        f"{parameters.shared / 1e6:,.1f}M shared, {parameters.residuals / 1e6:,.1f}M LoRA",
        f"runs as   {parameters.effective / 1e6:,.1f}M parameters, {model.layout.num_layers} layers",
        f"KV cache  {model.kv_bytes_per_token:,} bytes per token",
        f"LoRA      rank {model.lora_rank}{pattern}",
        f"exits     {_exits(model)}",
        f"routers   {_routers(model)}",
        f"history   {len(model.history)} uptraining runs",
    ]
    return "\n".join(lines)


def _exits(model: recursify.ModelDescription) -> str:
    exits = model.exits
    if exits is None:
        return "none"
    depths = ", ".join(map(str, exits.depths))
    return f"after depth {depths}: {exits.head} head{', through the coda' if exits.through_coda else ''}"


def _routers(model: recursify.ModelDescription) -> str:
    routing = model.routing
    if routing is None:
        return "none"
    loads = ", ".join(f"{capacity:.0%}" for capacity in routing.capacities or ())
    fractions = f", running {loads} of the tokens" if loads else ""
    return f"{routing.router}{fractions}; KV cache {routing.kv}, gate {routing.gate}"
