"""``recursify push``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import JsonOption, RecursiveArgument
from .report import format_table, print_data, print_json, talk

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
    from recursify.checkpoint.description import inspect_model
    from recursify.checkpoint.layout_picture import draw_svg
    from recursify.checkpoint.record import read_record
    from recursify.hub.card import write_card
    from recursify.hub.publication import CARD_FILE, read_card, stage_publication, without_local_paths

    record = without_local_paths(read_record(folder))
    description = inspect_model(folder)
    pictures = {"layout.svg": draw_svg(without_local_paths(description.to_dict()))}
    written = write_card(
        description, record, repo_id, base_model=base_model, license=license, picture=next(iter(pictures))
    )
    if card is not None and (base_model or license):
        raise typer.BadParameter("a card of your own says these itself", param_hint="--base-model / --license")
    own = card or (folder / CARD_FILE if (folder / CARD_FILE).exists() else None)
    text = read_card(own) if own else written.text
    if own is not None and (base_model or license):
        talk.print(f"warning: {own} is used as it is; --base-model and --license are for a card that is written")
    for warning in written.warnings:
        talk.print(f"warning: {warning}")
    with tempfile.TemporaryDirectory() as scratch:
        talk.print(f"checking {folder}")
        publication = stage_publication(folder, Path(scratch), text, pictures)
        if publication.difference is None:
            talk.print("warning: recursify.json has no fingerprint, so what the model says could not be compared.")
        facts: dict[str, Any] = {
            "repo_id": repo_id,
            "files": publication.sizes,
            "left_out": publication.left_out,
            "difference": publication.difference,
            "warnings": written.warnings,
        }
        if dry_run:
            if json:
                print_json({**facts, "card": text})
            else:
                print_data(f"{_list_files(facts)}\n\n{CARD_FILE}:\n\n{text}")
            return
        from recursify.hub.push import push

        pushed = push(
            publication,
            repo_id,
            private=private,
            revision=revision,
            overwrite=overwrite,
            message=message,
            tell=talk.print,
        )
    facts |= {"repo_id": pushed.repo_id, "url": pushed.url, "commit": pushed.commit}
    if json:
        print_json(facts)
        return
    print_data(f"{_list_files(facts)}\n\npushed     {pushed.url}\ncommit     {pushed.commit}")


def _list_files(facts: dict[str, Any]) -> str:
    rows = [[name, f"{size:,}"] for name, size in facts["files"].items()]
    rows.append([f"{len(rows)} files", f"{sum(facts['files'].values()):,}"])
    left_out = f"\n\nleft out   {', '.join(facts['left_out'])}" if facts["left_out"] else ""
    return format_table(["file", "bytes"], rows) + left_out
