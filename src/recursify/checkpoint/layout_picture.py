"""Pictures of the layout of a recursive model: text, and SVG drawn with the standard library alone.

Left to right, as a token passes: embedding, prelude, shared block, coda, final norm and head. Every number in a layer's
box is a position; a layer of the block has one for each depth, from the first downwards.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from recursify.modeling import LayerLayout

MARGIN, GAP, LINE = 24, 30, 16
"""Around the picture; between two parts, where the arrow is; from one line of text to the next. All in pixels."""
MOST_ONCE, MOST_SHARED, MOST_DEPTHS = 6, 12, 5
"""Layers of prelude or coda, layers of the block, and depths that are drawn each; more, and the middle is "7…23"."""
STYLE = """
text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2933 }
.name { font-size: 16px; font-weight: 600 }
.strong { font-weight: 600 }
.muted { fill: #52606d }
.paper { fill: #ffffff; stroke: #cbd2d9 }
.end { fill: #e4e7eb; stroke: #7b8794 }
.once { fill: #eaf3fb; stroke: #0072b2 }
.shared { fill: #fdf1d6; stroke: #c27c00 }
.layer { fill: #ffffff; stroke: #7b8794 }
.exit { fill: #def3ea; stroke: #00805f }
.router { fill: #f6e3ee; stroke: #a8487d }
.line { fill: none; stroke: #3e4c59; stroke-width: 1.5 }
.dashed { fill: none; stroke: #3e4c59; stroke-width: 1.5; stroke-dasharray: 5 3 }
.tip { fill: #3e4c59 }
"""


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


def draw_svg(description: dict[str, Any]) -> str:
    """The layout as a self-contained SVG document, the same for the same description.

    Args:
        description: What :func:`~recursify.checkpoint.description.describe` returns. It may have ``routers`` besides,
            ``{"kind": str, "depths": [int, ...]}``: the recursions that choose their tokens on entry, and how.
    """
    facts = description["layout"]
    ends = {"num_prelude_layers": facts["prelude"], "num_coda_layers": facts["coda"]}
    layout = LayerLayout.fold(facts["effective_layers"], facts["num_recursions"], facts["order"], **ends)
    source = PurePath(description["made_from"] or "").name
    name = f"{source}, recursive" if source else "a recursive model"
    exits, caption = _exit_lines(description), _caption(description)
    canvas = _Canvas()
    canvas.text(MARGIN, 36, name, "name")
    canvas.text(MARGIN, 56, f"{description['family']}, {layout}", "muted")
    flow = _Flow(canvas, top=112 + 10 * len(exits), num_lines=min(layout.num_recursions, MOST_DEPTHS))
    block_left = _draw_parts(flow, layout, description)
    bottom = _draw_depths(canvas, block_left, flow.bottom + 16, layout, description)
    for i, line in enumerate(caption, 2):
        canvas.text(MARGIN, bottom + LINE * i, line, "muted")
    summary = "\n".join([draw_layout(layout), *exits, *caption])
    return canvas.document(bottom + LINE * (len(caption) + 1) + MARGIN, f"Layout of {name}: {layout}", summary)


class _Canvas:
    """SVG elements, and how far to the right they reach."""

    def __init__(self) -> None:
        self.elements: list[ET.Element] = []
        self.right = 0

    def add(self, tag: str, style: str, words: str = "", **attributes: object) -> None:
        self.elements.append(_element(tag, words, class_=style, **attributes))

    def text(self, x: int, y: int, words: str, style: str = "", anchor: str = "start") -> None:
        self.add("text", style, words, x=x, y=y, text_anchor=anchor)
        width = _text_width(words) * (4 if style == "name" else 3) // 3
        self.right = max(self.right, x + (width // 2 if anchor == "middle" else width))

    def box(self, x: int, y: int, width: int, height: int, style: str, lines: Sequence[str] = ()) -> None:
        """A box with lines of text in its middle."""
        self.add("rect", style, x=x, y=y, width=width, height=height, rx=5)
        self.right = max(self.right, x + width)
        for i, line in enumerate(lines):
            self.text(x + width // 2, y + (height - LINE * len(lines)) // 2 + LINE * i + 12, line, anchor="middle")

    def arrow(self, path: str, style: str = "line") -> None:
        self.add("path", style, d=path, marker_end="url(#tip)")

    def document(self, height: int, title: str, summary: str) -> str:
        """Everything, on a sheet of paper of its own: the page behind may be dark."""
        width = self.right + MARGIN
        svg = _element("svg", xmlns="http://www.w3.org/2000/svg", width=width, height=height)
        svg.attrib |= {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-labelledby": "title desc"}
        tip = _element("marker", id="tip", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=5, markerHeight=5)
        tip.set("orient", "auto")
        tip.append(_element("path", class_="tip", d="M0 0L8 4L0 8Z"))
        paper = _element("rect", class_="paper", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=8)
        names = [_element("title", title, id="title"), _element("desc", summary, id="desc")]
        svg.extend([*names, _element("style", STYLE), tip, paper, *self.elements])
        ET.indent(svg)
        return ET.tostring(svg, encoding="unicode") + "\n"


class _Flow:
    """The parts from left to right, joined by arrows; ``x`` is where the last one ends."""

    def __init__(self, canvas: _Canvas, *, top: int, num_lines: int):
        self.canvas = canvas
        self.top, self.middle, self.bottom = top, top + 22 + LINE * num_lines // 2, top + LINE * num_lines + 56
        self.x = 0

    def begin(self) -> int:
        """Where the next part begins, with an arrow to it from the last one."""
        if self.x:
            self.canvas.arrow(f"M{self.x} {self.middle}h{GAP - 1}")
        self.x = self.x + GAP if self.x else MARGIN
        return self.x

    def end(self, *lines: str) -> int:
        """A part without layers; returns where it begins."""
        left, width = self.begin(), max(map(_text_width, lines)) + 20
        self.canvas.box(left, self.middle - 24, width, 48, "end", lines)
        self.x += width
        return left

    def layers(self, label: str, style: str, cells: list[list[str]], *, loops: bool = False) -> None:
        """A part with a box for every layer, each with a loop of its own if ``loops``."""
        widths = [max(28, *(_text_width(line) + 14 for line in lines)) for lines in cells]
        inner = sum(widths) + 6 * (len(cells) - 1)
        left, width = self.begin(), max(inner, _text_width(label)) + 20
        self.canvas.box(left, self.top, width, self.bottom - self.top, style)
        self.canvas.text(left + width // 2, self.bottom - 9, label, anchor="middle")
        x = left + (width - inner) // 2
        for lines, cell_width in zip(cells, widths, strict=True):
            top = self.middle - LINE * len(lines) // 2 - 5
            self.canvas.box(x, top, cell_width, LINE * len(lines) + 10, "layer", lines)
            if loops:
                self.canvas.arrow(f"M{x + cell_width // 2 + 7} {top}c5 -16 -19 -16 -14 -1")
            x += cell_width + 6
        self.x += width

    def router(self, kind: str, depths: list[int]) -> int:
        """A diamond, through which tokens enter the block; returns its middle."""
        lines = [f"{kind} router", f"at depth {_listing(depths)}"]
        width = max(map(_text_width, lines)) + 20
        middle = self.x + width // 2
        self.canvas.add("path", "line", d=f"M{self.x} {self.middle}h{width}")
        self.canvas.add("path", "router", d=f"M{middle} {self.middle - 14}l14 14l-14 14l-14 -14Z")
        for i, line in enumerate(lines):
            self.canvas.text(middle, self.middle + 30 + LINE * i, line, anchor="middle")
        self.x += width
        return middle


def _draw_parts(flow: _Flow, layout: LayerLayout, description: dict[str, Any]) -> int:
    """The model from embedding to head; returns where the block begins."""
    exits, routers = _exits(description), description.get("routers")
    flow.end("embedding")
    if layout.num_prelude_layers:
        flow.layers("prelude, once", "once", _unshared(0, layout.num_prelude_layers))
    router = flow.router(routers["kind"], routers["depths"]) if routers else None
    block_left = flow.x + GAP
    _draw_block(flow, layout, (block_left + 16, flow.top - 1) if router is None else (router, flow.middle - 15))
    exit_from = flow.x + GAP // 2
    if layout.num_coda_layers:
        flow.layers("coda, once", "once", _unshared(layout.num_layers - layout.num_coda_layers, layout.num_layers))
    if exits and exits["through_coda"]:
        exit_from = flow.x + GAP // 2
    head_left = flow.end("final norm", "and head")
    if exits:
        _draw_exits(flow, exit_from, head_left, _exit_lines(description))
    return block_left


def _draw_block(flow: _Flow, layout: LayerLayout, entry: tuple[int, int]) -> None:
    """The shared layers once, and how often they run: one by one in place, or all and back to ``entry``."""
    cells = [
        ["⋮" if len(run) > 1 else _span(layout.position(index, run[0]) for index in indices) for run in _depths(layout)]
        for indices in _elide(layout.block_size, MOST_SHARED)
    ]
    left, repeated, in_place = flow.x + GAP, layout.num_recursions > 1, layout.order == "sequence"
    flow.layers("shared block, stored once", "shared", cells, loops=repeated and in_place)
    label_y = flow.top - 8
    if repeated and not in_place:
        (x, y), up = entry, flow.top - 18
        label_y = up - 15
        flow.canvas.arrow(f"M{flow.x - 16} {flow.top}V{up}q0 -8 -8 -8H{x + 8}q-8 0 -8 8V{y}")
    label = f"each × {layout.num_recursions}" if in_place else f"× {layout.num_recursions}"
    flow.canvas.text((left + flow.x) // 2, label_y, label, "strong", anchor="middle")


def _draw_exits(flow: _Flow, start: int, left: int, lines: list[str]) -> None:
    """The way out from ``start``, to a box above the head."""
    width, height = max(map(_text_width, lines)) + 20, LINE * len(lines) + 10
    top = flow.top - height - 10
    flow.canvas.add("circle", "tip", cx=start, cy=flow.middle, r=3)
    flow.canvas.arrow(f"M{start} {flow.middle}V{top + height // 2}H{left - 1}", "dashed")
    flow.canvas.box(left, top, width, height, "exit", lines)


def _draw_depths(canvas: _Canvas, left: int, top: int, layout: LayerLayout, description: dict[str, Any]) -> int:
    """A table of what the block is at every depth; returns where it ends."""
    last = layout.num_recursions - 1 if description["exit_depth"] is None else description["exit_depth"]
    rows = [["depth", "positions", "LoRA"]]
    for run in _depths(layout):
        part = f", run to depth {last}" if last < run[-1] else ""
        positions = sorted(layout.position(index, depth) for depth in run for index in range(layout.block_size))
        rows.append([_span(run), _listing(positions), _residual(description) + part if run[0] <= last else "not run"])
    widths = [max(map(_text_width, column)) + 20 for column in zip(*rows, strict=True)]
    canvas.box(left, top, sum(widths), LINE * len(rows) + 12, "shared")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            canvas.text(left + 10 + sum(widths[:j]), top + 18 + LINE * i, cell, "" if i else "strong")
    return top + LINE * len(rows) + 12


def _exits(description: dict[str, Any]) -> dict[str, Any] | None:
    """The exits, if any. A model without heads for them can have a fixed ``exit_depth``, and reads out with its own."""
    if description["exits"] is None and description["exit_depth"] is not None:
        return {"head": "shared", "depths": [description["exit_depth"]], "through_coda": True}
    return description["exits"]


def _exit_lines(description: dict[str, Any]) -> list[str]:
    exits, exit_depth = _exits(description), description["exit_depth"]
    if exits is None:
        return []
    way = f", {'through' if exits['through_coda'] else 'past'} the coda" if description["layout"]["coda"] else ""
    fixed = [] if exit_depth is None else [f"every token exits after depth {exit_depth}"]
    return [f"exit after depth {_listing(exits['depths'])}", f"{exits['head']} head{way}", *fixed]


def _residual(description: dict[str, Any]) -> str:
    """The LoRA of one depth."""
    own = f", {n} of their own" if (n := len(description["lora_rank_pattern"])) else ""
    return (f"rank {description['lora_rank']}" if description["lora_rank"] else "no residual") + own


def _caption(description: dict[str, Any]) -> list[str]:
    layout = description["layout"]
    millions = {name: f"{count / 1e6:,.1f}M" for name, count in description["parameters"].items()}
    return [
        f"layers: {layout['unique_layers']} stored, {layout['effective_layers']} effective",
        f"parameters: {millions['stored']} stored ({millions['shared']} shared, {millions['residuals']} LoRA), "
        f"{millions['effective']} effective",
    ]


def _unshared(first: int, end: int) -> list[list[str]]:
    """Boxes of the layers at positions ``first .. end - 1``."""
    return [[_span(first + index for index in run)] for run in _elide(end - first, MOST_ONCE)]


def _depths(layout: LayerLayout) -> list[range]:
    return _elide(layout.num_recursions, MOST_DEPTHS)


def _elide(count: int, most: int) -> list[range]:
    """``0 .. count - 1`` one by one, or in ``most`` runs, of which the one in the middle has all that are too many."""
    ones = [range(i, i + 1) for i in range(count)]
    if count <= most:
        return ones
    before, after = most // 2, count - (most - 1) // 2
    return [*ones[:before], range(before, after), *ones[after:]]


def _span(numbers: Iterable[int]) -> str:
    """``4``, or ``7…23`` for several."""
    first, *others = sorted(numbers)
    return f"{first}…{others[-1]}" if others else str(first)


def _listing(numbers: Sequence[int]) -> str:
    """Of sorted numbers: ``4``, ``4-14``, ``4, 6``, or ``4, 6, …, 24``."""
    if 1 < len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) > 3:
        return f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _text_width(words: str) -> int:
    """About what a proportional font of 12 pixels needs."""
    return 7 * len(words)


def _element(tag: str, words: str = "", **attributes: object) -> ET.Element:
    """An element; ``class_=`` is ``class``, ``text_anchor=`` is ``text-anchor``. Control characters are no XML."""
    named = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()}
    element = ET.Element(tag, named)
    element.text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in words) or None
    return element
