"""Figures that a benchmark writes row by row: a CSV, the setup beside it as JSON, and a table in Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Key = tuple[Any, ...]


class KeyedResults:
    """Rows under keys, merged into what the output holds and written at once, so that a run can be continued.

    Args:
        output: The CSV.
        columns: Its columns.
        key: Which row figures belong to; CSV has strings for numbers. Rows are written in its order.
        setup: What all rows have in common.
        report: The Markdown of all rows.

    Raises:
        SystemExit: The output holds figures taken under another setup.
    """

    def __init__(
        self,
        output: Path,
        columns: Iterable[str],
        key: Callable[[Figures], Key],
        setup: dict[str, Any],
        report: Callable[[dict[Key, Figures]], str],
    ):
        self.output = output
        self.columns = list(columns)
        self.key = key
        self.setup = setup
        self.report = report
        self.rows: dict[Key, Figures] = {}
        if not output.exists():
            return
        known = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        if differing := [name for name in setup if known.get(name) != setup[name]]:
            lines = [f"  {name}: {known.get(name)} there, {setup[name]} here" for name in differing]
            raise SystemExit("\n".join([f"'{output}' was made otherwise; give another --output:", *lines]))
        with output.open(encoding="utf-8", newline="") as file:
            self.rows = {key(row): row for row in csv.DictReader(file)}

    def add(self, figures: Figures) -> None:
        """Put a row in, in place of an older one, and write the files."""
        self.rows[self.key(figures)] = figures
        self.rows = dict(sorted(self.rows.items()))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        self.output.with_suffix(".json").write_text(json.dumps(self.setup, indent=2) + "\n", encoding="utf-8")
        self.output.with_suffix(".md").write_text(self.report(self.rows), encoding="utf-8")


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table: first column left, the others right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(perplexity: str | float) -> str:
    """Two decimals below a hundred, none above."""
    value = float(perplexity)
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
