"""``recursify push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

EXAMPLES = """
Upload a recursive model to the Hub, with a model card of what was recorded and measured.

The folder is checked first: it has to load in a fresh process without recursify and say what it said when it was made,
and hold no pickle, no secret and no path of this machine. An upload that was cut goes on where it was with the same
command.

**Examples**

`recursify push smollm2-healed me/smollm2-recursive --dry-run`

`recursify push smollm2-healed me/smollm2-recursive --private`

`recursify push llama-r2 me/llama-r2 --base-model meta-llama/Llama-3.2-1B --license llama3.2`
"""


def register(app: typer.Typer) -> None:
    app.command("push", help=EXAMPLES)(push_command)


def push_command(
    folder: RecursiveArgument,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name, or name for your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch to commit to; made if it is not there.", show_default=False),
    ] = None,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload recursive model with recursify",
    card: Annotated[
        Path | None,
        typer.Option(
            "--card",
            help="Your own model card. [default: README.md of the folder, else one is written]",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Hub id of the dense model. [default: as recorded]", show_default=False),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", help="Of this model. [default: the dense model's, as recorded]", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete files of the repository that the model does not have.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print files and card, upload nothing.")] = False,
    json: JsonOption = False,
) -> None:
    from recursify.hub.publication import CARD_FILE
    from recursify.hub.push import push_model

    with progress_report() as progress:
        result = push_model(
            folder,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            card=card,
            base_model=base_model,
            license=license,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if json:
        print_json(result.to_dict())
        return
    rows = [[name, f"{size:,}"] for name, size in result.files.items()]
    rows.append([f"{len(rows)} files", f"{sum(result.files.values()):,}"])
    lines = [format_table(["file", "bytes"], rows), ""]
    if result.left_out:
        lines += [f"left out   {', '.join(result.left_out)}", ""]
    if dry_run:
        lines += [f"{CARD_FILE}:", "", result.card]
    else:
        lines += [f"pushed     {result.url}", f"commit     {result.commit}"]
    print_data("\n".join(lines))
