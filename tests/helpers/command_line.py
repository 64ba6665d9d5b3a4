"""The command line in process, as a user types it."""

from __future__ import annotations

from recursify.cli.app import main


def run(*arguments: object) -> int:
    """Run the command line and return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
