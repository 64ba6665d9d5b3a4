"""``recursify push``."""

from __future__ import annotations

from typing import Annotated

import typer

import recursify
from recursify import PushSettings

from .from_settings import options_from_settings
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


@options_from_settings
def command(
    folder: RecursiveArgument,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name, or name for your own account.")],
    settings: PushSettings,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print files and card, upload nothing.")] = False,
    json: JsonOption = False,
) -> None:
    with progress_report() as progress:
        result = recursify.push_model(folder, repo_id, settings=settings, dry_run=dry_run, progress=progress)
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
