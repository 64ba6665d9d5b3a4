"""``recursify push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import recursify

from .options import JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, progress_report

HELP = """
Upload a recursive model to the Hub, with a model card of everything that was recorded and measured.

The folder is checked first: it must load in a fresh process without recursify, reproduce the recorded fingerprint, and
contain no pickle, no secret and no local path. To resume an interrupted upload, run the same command again.

**Examples**

`recursify push smollm2-healed me/smollm2-recursive --dry-run`

`recursify push smollm2-healed me/smollm2-recursive --private`

`recursify push llama-r2 me/llama-r2 --base-model meta-llama/Llama-3.2-1B --license llama3.2`
"""


def command(
    folder: RecursiveArgument,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name, or name for your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Branch to commit to, created if it does not exist.", show_default=False),
    ] = None,
    message: Annotated[
        str, typer.Option("--message", help="Commit message.")
    ] = "Upload recursive model with recursify",
    card: Annotated[
        Path | None,
        typer.Option(
            "--card",
            help="Model card to upload. Without it, README.md of the folder, else one is written.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", help="Hub id of the dense model. Without it, the recorded one.", show_default=False
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="License of this model. Without it, the dense model's recorded one.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete files of the repository that the model does not have.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print files and card, upload nothing.")] = False,
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        result = recursify.push_model(
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
    elif dry_run:
        print_data(f"{_list_files(result)}\n\nREADME.md:\n\n{result.card}")
    else:
        print_data(f"{_list_files(result)}\n\npushed     {result.url}\ncommit     {result.commit}")


def _list_files(result: recursify.PushResult) -> str:
    rows = [[name, f"{size:,}"] for name, size in result.files.items()]
    rows.append([f"{len(rows)} files", f"{sum(result.files.values()):,}"])
    left_out = f"\n\nleft out   {', '.join(result.left_out)}" if result.left_out else ""
    return format_table(["file", "bytes"], rows) + left_out
