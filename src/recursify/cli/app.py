"""The ``recursify`` command: registers the sub-commands, and turns our errors into one line and exit code 1."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import recursify
from recursify.errors import RecursifyError

from . import (
    bench,
    calibrate_exits,
    chat,
    convert,
    eval,
    export,
    generate,
    inspect,
    perplexity,
    push,
    serve,
    uptrain,
)

app = typer.Typer(
    name="recursify",
    help="Make pretrained LLMs recursive: cheaper to hold, faster to run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MODULES = (
    convert,
    uptrain,
    calibrate_exits,
    inspect,
    perplexity,
    eval,
    generate,
    chat,
    serve,
    bench,
    export,
    push,
)
for module in MODULES:
    module.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recursify {recursify.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 0 when done, 1 on our errors, 2 on wrong usage, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments)
    except RecursifyError as error:
        if "--debug" in arguments:
            raise
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
