"""Every figure in README and docs equals one in ``benchmarks/results/``, as far as it is written out.

A block (a paragraph, a list or a table) that states measurements stands behind a comment that names its sources::

    <!-- figures: quality.csv, uptraining.csv -->

Each number in the block has to be a number in those files, rounded as it is written: times 100 before a ``%``, in
millions before an ``M``. With ``by row`` behind a file, the numbers of a table's row have to come from one row of
that file. A block with decimal numbers that are no measurements stands behind ``<!-- not measured -->``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.pages import DOCS, ROOT, named

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if "reference" not in page.parts)]

MARKER = re.compile(r"<!-- (?:figures: (?P<sources>.+?)|(?P<exempt>not measured.*?)) -->")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
IGNORED = re.compile(
    r"`[^`\n]*`|\]\([^)\s]*\)|arXiv\s[\d.]+|(?:transformers|torch|Python|Triton|NumPy|CUDA|capability)\s[<>≥=]*\s*[\d.]+"
    r"|[<>≥]=?\s\d+(?:\.\d+)?|\b\w+[-_]?\d[\w.]*[-_]\w+|\b[A-Za-z]+-?\d[\w.-]*"
)
NUMBER = re.compile(
    r"(?<![\w.,])(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?P<unit>\s?(?:%|×|M\b|B\b))?(?![\w,]*\d)"
)
SCALES = {"%": 100.0, "M": 1e-6, "B": 1e-9}


@dataclass(frozen=True)
class Figure:
    """A number of a page.

    Attributes:
        text: The number as it is written, with its unit.
        value: Its value.
        digits: Number of its decimals.
        unit: ``%``, ``×``, ``M``, ``B`` or nothing.
    """

    text: str
    value: float
    digits: int
    unit: str

    def equals(self, number: float) -> bool:
        """Whether ``number`` is written so when it is rounded."""
        scales = {1.0, SCALES.get(self.unit, 1.0)}
        tolerance = 0.5 * 10**-self.digits * (1 + 1e-6)
        return any(abs(number * scale - self.value) <= tolerance for scale in scales)


def figures_in(text: str, *, integers: bool) -> list[Figure]:
    """The numbers in ``text`` that can be measurements: decimals, those with a unit, and long integers if asked."""
    found = []
    for match in NUMBER.finditer(IGNORED.sub(" ", text)):
        digits, unit = match["digits"], (match["unit"] or "").strip()
        decimals = len(digits.partition(".")[2])
        if decimals or unit or (integers and len(digits) > 2):
            found.append(Figure(match[0], float(digits.replace(",", "")), decimals, unit))
    return found


def rows_of(source: Path) -> list[list[float]]:
    """The numbers of a result file, by row (csv, md) or all together (json)."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".json":
        return [list(_numbers(json.loads(text)))]
    if source.suffix == ".csv":
        return [list(_numbers(row)) for row in csv.reader(text.splitlines())]
    return [[figure.value for figure in map(_plain, NUMBER.finditer(line))] for line in text.splitlines()]


def _plain(match: re.Match[str]) -> Figure:
    return Figure(match[0], float(match["digits"].replace(",", "")), 0, "")


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, str):
        for part in NUMBER.finditer(value):
            yield float(part["digits"].replace(",", ""))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@dataclass(frozen=True)
class Block:
    """Lines of a page between blank ones.

    Attributes:
        page: The page.
        line: Number of its first line, from 1.
        text: The lines.
        sources: What its marker says, or None without one.
    """

    page: Path
    line: int
    text: str
    sources: str | None

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}"

    @property
    def is_table(self) -> bool:
        """Whether it is a table."""
        return self.text.startswith("|")


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of ``page`` outside fences, each with the marker before it."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    marker, lines, start = None, [], 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if found := MARKER.fullmatch(line.strip()):
            marker = found["sources"] or found["exempt"]
        elif line.strip():
            start = start or number
            lines.append(line)
        elif lines:
            yield Block(page, start, "\n".join(lines), marker)
            marker, lines, start = None, [], 0


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
MARKED = [block for block in BLOCKS if block.sources and not block.sources.startswith("not measured")]


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_figures_are_those_of_the_result_files(block):
    """Each number of the block stands in the files that it names; a table's row, if asked, in one row of them."""
    by_row, everything = [], []
    for source in block.sources.split(","):
        name, _, how = source.strip().partition(" ")
        rows = rows_of(RESULTS / name)
        everything += [number for row in rows for number in row]
        by_row += rows if how == "by row" else []
    lines = block.text.splitlines()
    body = [line.split("|", 2)[2] for line in lines[2:]] if block.is_table else [block.text]  # without the labels
    for line in body:
        figures = figures_in(line, integers=block.is_table)
        for figure in figures:
            assert any(map(figure.equals, everything)), f"{block}: {figure.text} is not in {block.sources}"
        if by_row and figures:
            fits = [row for row in by_row if all(any(map(figure.equals, row)) for figure in figures)]
            assert fits, f"{block}: no row of {block.sources} has {[figure.text for figure in figures]}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_figures_name_their_sources(page):
    """A decimal number, a percentage or a ratio outside code has a marker before its block."""
    for block in BLOCKS:
        if block.page == page and block.sources is None and not block.text.startswith(("#", "--8<--")):
            found = figures_in(block.text, integers=False)
            assert not found, f"{block} states {found[0].text} and names no result file"


def test_a_wrong_figure_is_found():
    """Numbers are compared as they are rounded, with their unit."""
    assert Figure("24.4", 24.4, 1, "").equals(24.3921)
    assert not Figure("24.5", 24.5, 1, "").equals(24.3921)
    assert Figure("59.7 %", 59.7, 1, "%").equals(0.597)
    assert Figure("109.9M", 109.9, 1, "M").equals(109914432)
    assert not Figure("1.5", 1.5, 1, "").equals(1.37)
    found = figures_in("`recursify bench` gains 1.22 times with 8 and 59.7 % in 10,049 rows", integers=False)
    assert [figure.text for figure in found] == ["1.22", "59.7 %"]
