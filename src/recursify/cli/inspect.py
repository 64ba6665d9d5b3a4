"""``recursify inspect``."""

from __future__ import annotations

import typer

from .options import JsonOption, RecursiveArgument
from .report import print_data, print_json

EXAMPLES = """
What a recursive model is: layout, unique and effective parameters, bytes, KV bytes per token, history.

**Examples**

`recursify inspect smollm2-r2`

`recursify inspect smollm2-r2 --json | jq .parameters`
"""


def register(app: typer.Typer) -> None:
    app.command("inspect", help=EXAMPLES)(inspect_command)


def inspect_command(folder: RecursiveArgument, json: JsonOption = False) -> None:
    from recursify.checkpoint.record import read_record
    from recursify.convert.description import describe, draw_layout

    from .models import require_recursive

    require_recursive(folder)
    facts = describe(folder, read_record(folder))
    if json:
        print_json(facts)
        return
    parameters = facts["parameters"]
    exits = facts["exits"]
    exit_line = "none"
    if exits:
        depths = ", ".join(map(str, exits["depths"]))
        exit_line = f"after depth {depths}: {exits['head']} head{', through the coda' if exits['through_coda'] else ''}"
    made = ", ".join(str(facts[key]) for key in ("initialization", "relaxation") if facts[key])
    print_data(
        "\n".join(
            [
                draw_layout(facts),
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
                f"history   {len(facts['history'])} uptraining runs",
            ]
        )
    )
