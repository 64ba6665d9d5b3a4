"""Figures with matplotlib, if it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recursify.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED, DARK = "#c77f0a", "#1f2937"
"""Colors of the shared block, and of text and emphasis."""


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure; sizes are in inches.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("Figures need matplotlib. Run: pip install 'recursify[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure in the format of the file name (png, svg, pdf); the same figure gives the same SVG.

    Raises:
        SettingsError: The format is not supported.
        OutputError: The file cannot be written.
    """
    from matplotlib import rc_context

    file = Path(file)
    metadata = {"Date": None} if file.suffix.lower() == ".svg" else {}
    try:
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "recursify"}):
            figure.savefig(file, dpi=150, metadata=metadata)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"'{file}' is not a supported image file name: {reason} Use .png or .svg.") from error
    except OSError as error:
        raise OutputError(f"Cannot write '{file}': {error.strerror}. Use another file name.") from error
