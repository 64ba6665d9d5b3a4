"""Progress of long operations: a callback that the caller may give, silent by default."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Callback that long operations call as they advance."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` units of ``stage`` are complete."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
