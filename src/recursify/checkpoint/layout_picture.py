"""Drawings of a layout, as text and as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from recursify.modeling import LayerLayout
from recursify.pictures import DARK, SHARED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ONCE, MAX_SHARED, MAX_DEPTHS = 6, 12, 5
"""Numbers of prelude or coda layers, block layers and depths to draw; the middle of longer ranges is elided (7…23)."""

MARGIN, GAP, LINE, CHARACTER = 0.3, 0.35, 0.17, 0.08
"""Border, distance between parts, line height, and width of a character, in inches."""

ONCE, END, EXIT = "#0072b2", "#7b8794", "#00805f"
"""Colors of layers that run once, of the model's ends, and of exits."""

ARROW = {"arrowstyle": "-|>", "color": DARK, "shrinkA": 0, "shrinkB": 0}


def draw_layout(layout: LayerLayout) -> str:
    """Draw the layers as text, one line per part."""
    first, last = layout.num_prelude_layers, layout.num_layers - layout.num_coda_layers
    cycles = layout.order == "cycle"
    repeated = f"× {layout.num_recursions}" if cycles else f"each × {layout.num_recursions} in place"
    lines = [f"prelude   layers 0-{first - 1}, once"] if first else []
    lines.append(f"block     {layout.block_size} shared layers {repeated}: positions {first}-{last - 1}")
    if cycles and layout.num_recursions > 1:
        starts = [layout.position(0, depth) for depth in range(layout.num_recursions)]
        spans = [f"depth {depth}: {start}-{start + layout.block_size - 1}" for depth, start in enumerate(starts)]
        lines.append(f"          {', '.join(spans)}")
    if layout.num_coda_layers:
        lines.append(f"coda      layers {last}-{layout.num_layers - 1}, once")
    return "\n".join(lines)


def plot_layout(
    layout: LayerLayout, *, title: str, captions: Sequence[str] = (), exits: str = "", through_coda: bool = True
) -> Figure:
    """Draw the layers as a figure.

    Parts follow in order of execution. The numbers in a layer's box are its positions, one per depth from top to bottom
    for a layer of the block.

    Args:
        layout: Layout to draw.
        title: Heading.
        captions: Lines below the drawing.
        exits: Label of the exits; empty for a model without exits.
        through_coda: True if exits pass the coda.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    parts = [part for part in _parts(layout) if part[2]]
    widths = [_part_width(label, cells) for label, _, cells in parts]
    half = LINE * min(layout.num_recursions, MAX_DEPTHS) / 2 + 0.15
    middle = MARGIN + LINE * len(captions) + half + 0.5
    width = max(sum(widths) + GAP * (len(parts) - 1), *(CHARACTER * len(line) for line in [title * 2, *captions]))
    figure = new_figure(width + 2 * MARGIN, height := middle + half + (1.4 if exits else 1.0))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width + 2 * MARGIN), ylim=(0, height))
    axes.set_axis_off()
    _write(axes, MARGIN, height - MARGIN, title, size=12, weight="bold", ha="left")
    _write(axes, MARGIN, MARGIN, "\n".join(captions), ha="left", va="bottom")
    x = MARGIN
    for (label, color, cells), part_width in zip(parts, widths, strict=True):
        if x > MARGIN:
            axes.annotate("", (x, middle), (x - GAP, middle), arrowprops=ARROW)
        is_block = color == SHARED
        _draw_part(axes, x, middle, half, label, color, cells, loops=is_block and layout.order == "sequence")
        if is_block:
            top = middle + half
            exit_x = x + part_width + GAP / 2
            cycles = layout.order == "cycle"
            times = f"{'' if cycles else 'each '}× {layout.num_recursions}"
            _write(axes, x + part_width / 2, top + 0.28, times, weight="bold")
            if cycles and layout.num_recursions > 1:
                _loop(axes, x + 0.15, x + part_width - 0.15, top, 0.16)
        x += part_width + GAP
    if exits:
        exit_x = x - widths[-1] - 1.5 * GAP if through_coda else exit_x
        y = middle + half + 0.65
        axes.annotate("", (exit_x, y), (exit_x, middle), arrowprops={**ARROW, "color": EXIT, "linestyle": "--"})
        _write(axes, min(exit_x, x - GAP - CHARACTER * len(exits) / 2), y + 0.12, exits, color=EXIT)
    return figure


def depth_lines(layout: LayerLayout, residual: str, exit_depth: int | None = None) -> list[str]:
    """Captions with the positions and the residual of each depth; those after ``exit_depth`` do not run."""
    last = layout.num_recursions - 1 if exit_depth is None else exit_depth
    lines = []
    for run in _elide(layout.num_recursions, MAX_DEPTHS):
        positions = sorted(layout.position(index, depth) for depth in run for index in range(layout.block_size))
        partly = f", run to depth {last}" if run[0] <= last < run[-1] else ""
        note = residual + partly if run[0] <= last else "not run"
        lines.append(f"depth {_span(run)}: positions {_listing(positions)}, {note}")
    return lines


def _parts(layout: LayerLayout) -> list[tuple[str, str, list[str]]]:
    """Label, colour and cells of each part; the ends of the model have no label."""
    first, last = layout.num_prelude_layers, layout.num_layers - layout.num_coda_layers
    runs = _elide(layout.num_recursions, MAX_DEPTHS)
    block = [
        "\n".join("⋮" if len(run) > 1 else _span(layout.position(i, run[0]) for i in layers) for run in runs)
        for layers in _elide(layout.block_size, MAX_SHARED)
    ]
    return [
        ("", END, ["embedding"]),
        ("prelude, once", ONCE, [_span(run) for run in _elide(first, MAX_ONCE)]),
        ("shared block, stored once", SHARED, block),
        ("coda, once", ONCE, [_span(last + i for i in run) for run in _elide(layout.num_coda_layers, MAX_ONCE)]),
        ("", END, ["final norm\nand head"]),
    ]


def _cell_width(cell: str) -> float:
    return max(0.25, CHARACTER * max(map(len, cell.splitlines()))) + 0.15


def _part_width(label: str, cells: list[str]) -> float:
    return max(sum(map(_cell_width, cells)), CHARACTER * len(label)) + (0.2 if label else 0)


def _draw_part(
    axes: Any, left: float, middle: float, half: float, label: str, color: str, cells: list[str], *, loops: bool
) -> None:
    width = _part_width(label, cells)
    if label:
        axes.fill_between([left, left + width], middle - half - 0.25, middle + half, color=color, alpha=0.15, lw=0)
        _write(axes, left + width / 2, middle - half - 0.12, label)
    x = left + (width - sum(map(_cell_width, cells))) / 2
    for cell in cells:
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": color}
        _write(axes, x + _cell_width(cell) / 2, middle, cell, bbox=box)
        if loops and "\n" in cell:
            _loop(axes, x + 0.12, x + _cell_width(cell) - 0.12, middle + half - 0.05, 0.12)
        x += _cell_width(cell)


def _loop(axes: Any, left: float, right: float, y: float, height: float) -> None:
    """Arrow from ``right`` up and back to ``left``."""
    bar = f"bar,fraction={height / (right - left)}"
    axes.annotate("", (left, y), (right, y), arrowprops={**ARROW, "connectionstyle": bar})


def _write(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    # Folder names can contain dollar signs, and control characters and lone surrogates, which XML does not allow.
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    defaults = {"size": 9, "color": DARK, "ha": "center", "va": "center"}
    axes.text(x, y, text, parse_math=False, **{**defaults, **style})


def _elide(count: int, limit: int) -> list[range]:
    """Split ``0 .. count - 1`` into single numbers; above ``limit`` runs, the middle one takes the rest."""
    singles = [range(i, i + 1) for i in range(count)]
    if count <= limit:
        return singles
    start, stop = limit // 2, count - (limit - 1) // 2
    return [*singles[:start], range(start, stop), *singles[stop:]]


def _span(numbers: Iterable[int]) -> str:
    """Format as ``4``, or ``7…23`` for several."""
    first, *others = sorted(numbers)
    return f"{first}…{others[-1]}" if others else str(first)


def _listing(numbers: Sequence[int]) -> str:
    """Format sorted numbers as ``4``, ``4-14``, ``4, 6``, or ``4, 6, …, 24``."""
    if 1 < len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) > 3:
        return f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    return ", ".join(map(str, numbers))
