"""Pictures of measurements, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recursify.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED, DARK = "#c77f0a", "#1f2937"
"""Colours of the shared block, and of what stands out."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("Pictures need matplotlib. Run: pip install 'recursify[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, file: Path) -> None:
    """Write the kind of picture that the name of ``file`` asks for (png, svg, pdf).

    Raises:
        SettingsError: It asks for none.
        OutputError: The file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"'{file}' has no name of a picture: {reason} Use .png or .svg.") from error
    except OSError as error:
        raise OutputError(f"'{file}' cannot be written: {error}.") from error
