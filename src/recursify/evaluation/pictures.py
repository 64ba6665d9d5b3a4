"""Figures of measurements, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recursify.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED, DARK = "#c77f0a", "#1f2937"
"""Colors of the shared block, and of highlights."""


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of ``width`` by ``height`` inches.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("Pictures need matplotlib. Run: pip install 'recursify[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write ``figure`` in the format of the suffix of ``file`` (png, svg, pdf).

    Raises:
        SettingsError: The format is not supported.
        OutputError: The file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"'{file}' is not a supported image file name: {reason} Use .png or .svg.") from error
    except OSError as error:
        raise OutputError(f"'{file}' cannot be written: {error}. Choose another file.") from error
