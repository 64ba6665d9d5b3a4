"""Progress where there is no terminal: a line now and then, with rate and time left."""

from __future__ import annotations

import time

import pytest

from recursify.cli.report import format_table, progress_report


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_plain_progress(clock, capsys):
    """A report at once, one in ten seconds, and the last; what a resumed run had done has no part in its rate."""
    with progress_report() as progress:
        for seconds, done in ((0, 100), (5, 200), (10, 300), (15, 400), (20, 500)):
            clock[0] = 1000.0 + seconds
            progress("train", done, 500)
    assert capsys.readouterr().err.splitlines() == [
        "train: 100/500",
        "train: 300/500, 20/s, 0:10 left",
        "train: 500/500",
    ]


def test_slow_work_has_no_rate(clock, capsys):
    """Less than one a second is told by the time left alone."""
    with progress_report() as progress:
        progress("layer", 0, 30)
        clock[0] += 20.0
        progress("layer", 10, 30)
    assert capsys.readouterr().err.splitlines()[-1] == "layer: 10/30, 0:40 left"


def test_table():
    """First column left, the others right."""
    assert format_table(["a", "bb"], [["row", "1"]]) == "a    bb\n---  --\nrow   1"
