"""What commands print: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL_SECONDS = 10.0
"""Without a terminal, a stage reports at its ends and this often in between."""

talk = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
"""stderr."""


def print_data(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def print_styled(text: Text) -> None:
    """Print a result on stdout, in colours where that is a terminal."""
    Console(highlight=False, soft_wrap=True).print(text)


def print_json(data: Any) -> None:
    """Print a result on stdout as JSON."""
    print_data(json.dumps(data, indent=2))


class _RateColumn(ProgressColumn):
    """How many a second, where that is a number worth reading."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 1 else "")


@contextmanager
def progress_report() -> Iterator[Any]:
    """A callback ``(stage, done, total)``: bars on a terminal, a plain line now and then elsewhere.

    Both tell how many a second are done, and how long the rest will take.
    """
    if talk.is_terminal:
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=talk, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def on_bar(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield on_bar
        return

    begun: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def on_line(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun.setdefault(stage, (now, done))
        if done == total or now - last.get(stage, now - PLAIN_INTERVAL_SECONDS) >= PLAIN_INTERVAL_SECONDS:
            last[stage] = now
            since, before = begun[stage]
            talk.print(f"{stage}: {done}/{total}{_rate_and_rest(now - since, done - before, total - done)}")

    yield on_line


def _rate_and_rest(seconds: float, done: int, left: int) -> str:
    """``, 95/s, 2:10 left``; nothing before the second report."""
    if not done or not left or seconds <= 0:
        return ""
    rate = done / seconds
    minutes, rest = divmod(round(left / rate), 60)
    return f"{f', {rate:,.0f}/s' if rate >= 1 else ''}, {minutes}:{rest:02} left"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A plain table: first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
