"""The ``recursify`` command: a table of sub-commands, and errors as one line with exit code 1."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import recursify
from recursify.errors import RecursifyError

COMMANDS = {
    "plan": "Predict the best layouts of a model by size.",
    "convert": "Convert a pretrained model into a recursive one.",
    "uptrain": "Train a recursive model on your own data.",
    "calibrate-exits": "Choose exit thresholds for a target agreement.",
    "inspect": "Show layout, parameters, size and history of a recursive model.",
    "perplexity": "Measure perplexity, alone or against another model.",
    "eval": "Score a recursive model on lm-evaluation-harness tasks, at any depth.",
    "generate": "Continue a prompt.",
    "chat": "Chat with a model in the terminal.",
    "serve": "Serve a model over OpenAI's API.",
    "bench": "Measure the speed of the engine against transformers.",
    "export": "Write a recursive model for stock libraries.",
    "push": "Upload a recursive model to the Hub, with a model card.",
}
"""Sub-commands and their summaries; the code of ``calibrate-exits`` is in ``cli/calibrate_exits.py``."""


class LazyCommand(TyperCommand):
    """Sub-command whose module is imported when it runs."""

    def load(self) -> Any:
        """Import the module and return its command, a ``TyperCommand``."""
        assert self.name is not None
        module = import_module(f"recursify.cli.{self.name.replace('-', '_')}")
        single = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)
        single.command(self.name, help=module.HELP)(module.command)
        command = typer.main.get_command(single)
        command.context_settings = dict(self.context_settings)
        return command

    def make_context(self, *args: Any, **keywords: Any) -> Any:
        """Parse arguments with the command itself."""
        return self.load().make_context(*args, **keywords)


class LazyGroup(TyperGroup):
    """Group of :data:`COMMANDS`."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        for name, summary in COMMANDS.items():
            self.add_command(LazyCommand(name, help=summary, context_settings=dict(self.context_settings)))


app = typer.Typer(
    name="recursify",
    cls=LazyGroup,
    help="Convert pretrained LLMs into recursive ones: smaller on disk and in memory.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    """Run the command line; exit codes: 0 success, 1 our errors, 2 wrong usage, 130 interrupted."""
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
