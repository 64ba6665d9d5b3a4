"""Output of commands: data on stdout, messages on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from recursify.progress import Progress

PLAIN_INTERVAL_SECONDS = 10.0
"""Interval of progress lines where stderr is not a terminal."""

talk = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
"""Console for messages, on stderr."""


def print_data(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def print_styled(text: Text) -> None:
    """Print a result on stdout, in colours on a terminal."""
    Console(highlight=False, soft_wrap=True).print(text)


def print_json(data: Any) -> None:
    """Print a result on stdout as JSON."""
    print_data(json.dumps(data, indent=2))


class _RateColumn(rich_progress.ProgressColumn):
    """Units per second, if at least one."""

    def render(self, task: rich_progress.Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 1 else "")


@contextmanager
def progress_report() -> Iterator[Progress]:
    """Yield a progress callback: bars on a terminal, lines elsewhere; both with the rate and the remaining time."""
    if talk.is_terminal:
        columns = (
            rich_progress.TextColumn("{task.description:<10}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            _RateColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=talk, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def on_bar(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield on_bar
        return

    first: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def on_line(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        first.setdefault(stage, (now, done))
        if done == total or now - last.get(stage, now - PLAIN_INTERVAL_SECONDS) >= PLAIN_INTERVAL_SECONDS:
            last[stage] = now
            since, before = first[stage]
            talk.print(f"{stage}: {done}/{total}{_rate(now - since, done - before, total - done)}")

    yield on_line


def _rate(seconds: float, done: int, remaining: int) -> str:
    """``, 95/s, 2:10 left``; empty for the first report."""
    if not done or not remaining or seconds <= 0:
        return ""
    rate = done / seconds
    minutes, rest = divmod(round(remaining / rate), 60)
    return f"{f', {rate:,.0f}/s' if rate >= 1 else ''}, {minutes}:{rest:02} left"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Plain table: first column aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
