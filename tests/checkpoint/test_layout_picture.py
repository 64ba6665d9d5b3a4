"""Figures of layouts: every fact of a description is in the figure, whatever the layout."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from recursify.checkpoint import description as description_module
from recursify.checkpoint.description import ExitDescription, ModelDescription, ParameterCounts, RouterDescription
from recursify.errors import OutputError, SettingsError
from recursify.modeling import LayerLayout

SVG = "{http://www.w3.org/2000/svg}"
THROUGH = ExitDescription(head="low_rank", depths=[0, 1], through_coda=True)
PAST = ExitDescription(head="norm", depths=[0, 1], through_coda=False)


def describe(num_layers: int, num_recursions: int, sharing: str = "cycle", ends: int = 0, **facts) -> ModelDescription:
    """Description of such a model; ``ends``: layers of prelude, and of coda."""
    values = {
        "family": "llama",
        "layout": LayerLayout.fold(num_layers, num_recursions, sharing, num_prelude_layers=ends, num_coda_layers=ends),
        "lora_rank": 64,
        "lora_rank_pattern": {},
        "tie_norms": False,
        "parameters": ParameterCounts(
            stored=109_900_000, effective=134_500_000, shared=38_900_000, residuals=14_300_000, exits=0, routers=0
        ),
        "exits": None,
        "exit_depth": None,
        "routing": None,
        "num_bytes": 1,
        "dtype": "float32",
        "kv_bytes_per_token": 1,
        "made_from": "smollm2-135m",
        "initialization": None,
        "relaxation": None,
        "calibration": None,
        "history": [],
        "recursify_version": None,
    }
    return ModelDescription(**{**values, **facts})


@pytest.fixture
def draw(monkeypatch):
    """Function that draws a description as a figure."""
    figures = []
    monkeypatch.setattr(description_module, "save_figure", lambda figure, file: figures.append(figure))

    def drawn(*arguments, **facts) -> Figure:
        describe(*arguments, **facts).plot("layout.svg")
        return figures[-1]

    return drawn


def texts(figure: Figure) -> list[str]:
    """Everything written in the figure, in the order of drawing; captions line by line."""
    return [line for text in figure.axes[0].texts for line in text.get_text().split("\n") if line]


def num_arrows(figure: Figure) -> int:
    return sum(isinstance(text, Annotation) for text in figure.axes[0].texts)


def num_layers(figure: Figure) -> int:
    """Boxes of layers; the two ends of the model have boxes, too."""
    return sum(text.get_bbox_patch() is not None for text in figure.axes[0].texts) - 2


def test_cycle(draw):
    """4 + (11 layers × 2) + 4: all parts in their order, one number per position, and one loop."""
    figure = draw(30, 2, "cycle", 4)
    assert texts(figure) == [
        "smollm2-135m, recursive",
        "llama, 4 + (11 layers × 2) + 4",
        *["depth 0: positions 4-14, rank 64", "depth 1: positions 15-25, rank 64"],
        "layers: 19 stored, 30 effective",
        "parameters: 109.9M stored (38.9M shared, 14.3M LoRA), 134.5M effective",
        *["embedding", "prelude, once", "0", "1", "2", "3"],
        "shared block, stored once",
        *[str(position) for index in range(11) for position in (4 + index, 15 + index)],
        *["× 2", "coda, once", "26", "27", "28", "29", "final norm", "and head"],
    ]
    assert num_layers(figure) == 19
    assert num_arrows(figure) == 4 + 1


def test_sequence(draw):
    """Every shared layer has a loop of its own."""
    figure = draw(32, 3, "sequence", 1)
    assert "each × 3" in texts(figure)
    for depth, positions in enumerate(["1, 4, …, 28", "2, 5, …, 29", "3, 6, …, 30"]):
        assert f"depth {depth}: positions {positions}, rank 64" in texts(figure)
    block = texts(figure).index("shared block, stored once")
    assert texts(figure)[block + 1 : block + 4] == ["1", "2", "3"]
    assert num_arrows(figure) == 4 + 10


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_one_recursion(draw, sharing):
    """Nothing loops, and there is no prelude or coda if the model has none."""
    figure = draw(6, 1, sharing)
    assert ("each × 1" if sharing == "sequence" else "× 1") in texts(figure)
    assert not {"prelude, once", "coda, once"} & set(texts(figure))
    assert num_arrows(figure) == 2


@pytest.mark.parametrize(
    ("rank", "pattern", "residual"),
    [
        (0, {}, "no residual"),
        (8, {"mlp.down_proj": 128, "3.self_attn.q_proj": 32}, "rank 8, 2 modules with their own"),
        (0, {"mlp.down_proj": 128}, "no residual, 1 modules with their own"),
    ],
)
def test_residuals(draw, rank, pattern, residual):
    """One at every depth."""
    figure = draw(12, 3, lora_rank=rank, lora_rank_pattern=pattern)
    assert sum(line.endswith(f", {residual}") for line in texts(figure)) == 3


@pytest.mark.parametrize(
    ("ends", "exits", "head"),
    [
        (2, THROUGH, "low_rank head, through the coda"),
        (2, PAST, "norm head, past the coda"),
        (0, THROUGH, "low_rank head"),
        (0, PAST, "norm head"),
    ],
)
def test_exits(draw, ends, exits, head):
    """Depths and head are named; the arrow starts before or after the coda if there is one."""
    figure = draw(12 + 2 * ends, 3, "cycle", ends, exits=exits)
    assert f"exit after depth 0, 1: {head}" in texts(figure)
    exit_arrow = [text for text in figure.axes[0].texts if isinstance(text, Annotation)][-1]
    coda = [text.get_position()[0] for text in figure.axes[0].texts if text.get_text() == "coda, once"]
    assert all((exit_arrow.xy[0] > x) is exits.through_coda for x in coda)
    assert not any("not run" in line for line in texts(figure))


@pytest.mark.parametrize(
    ("exits", "head"), [(PAST, "norm head, past the coda"), (None, "shared head, through the coda")]
)
def test_exit_depth(draw, exits, head):
    """With a fixed depth, later ones do not run; a model without exit heads uses its own head."""
    lines = texts(draw(14, 3, "cycle", 1, exits=exits, exit_depth=0))
    assert f"exit after depth 0: {head}" in lines
    assert sum(line.endswith("rank 64") for line in lines) == 1
    assert sum(line.endswith("not run") for line in lines) == 2


def test_exit_depth_among_elided_ones(draw):
    """The line of several depths tells how far they run."""
    lines = texts(draw(32, 16, exit_depth=5))
    assert sum(line.endswith("rank 64") for line in lines) == 2
    assert sum(line.endswith("rank 64, run to depth 5") for line in lines) == 1
    assert sum(line.endswith("not run") for line in lines) == 2


def test_routers(draw):
    """Named in the caption."""
    routing = RouterDescription(
        router="expert_choice", capacities=None, thresholds=None, kv="recursion_wise", gate="residual"
    )
    assert "routers: expert_choice, before each recursion" in texts(draw(14, 3, "cycle", 1, routing=routing))


@pytest.mark.parametrize(
    ("arguments", "elided"),
    [
        ((80, 3, "cycle", 4), {"10…22", "34…46", "58…70"}),
        ((80, 2, "sequence", 1), {"13…67", "14…68"}),
        ((80, 2, "cycle", 30), {"3…27", "53…77"}),
        ((80, 1, "cycle"), {"6…74"}),
        ((80, 80, "cycle"), {"⋮", "depth 2…77: positions 2-77, rank 64"}),
        ((80, 8, "sequence"), {"⋮", "depth 2…5: positions 2, 3, …, 77, rank 64"}),
    ],
)
def test_deep_models(draw, arguments, elided):
    """80 layers are no wider than a screen, and the elided ones are named."""
    figure = draw(*arguments, exits=THROUGH if arguments[1] == 3 else None)
    assert elided <= set(texts(figure))
    assert num_layers(figure) <= 6 + 12 + 6
    assert figure.get_figwidth() <= 14
    assert figure.get_figheight() <= 6


@pytest.mark.parametrize("made_from", ["smollm2-135m", "a-rather-long-name-of-a-folder-" * 4])
@pytest.mark.parametrize("exits", [PAST, THROUGH])
def test_texts_are_inside_and_do_not_overlap(draw, made_from, exits):
    """As rendered: labels in the figure, and no two over one another."""
    figure = draw(80, 3, "cycle", 4, exits=exits, exit_depth=1, made_from=made_from)
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = [text for text in figure.axes[0].texts if text.get_text() and not isinstance(text, Annotation)]
    boxes = [text.get_window_extent(renderer) for text in labels]
    sheet = figure.bbox
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= sheet.x1 and box.y1 <= sheet.y1 for box in boxes)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    cells = [box for box, text in zip(boxes, labels, strict=True) if text.get_bbox_patch() is not None]
    assert all(left.x1 < right.x0 for left, right in pairwise(cells))


def test_any_name_is_valid_xml(tmp_path):
    """Markup, dollar signs, control characters and lone surrogates, which folder names can have; of a path, its end."""
    file = tmp_path / "layout.svg"
    describe(6, 2, made_from="/home/me/a & b <c> $x$\x00\udc80").plot(file)
    lines = ["".join(element.itertext()).strip() for element in ET.parse(file).iter(f"{SVG}text")]
    assert lines[0] == "a & b <c> $x$\ufffd\ufffd, recursive"
    describe(6, 2, made_from=None).plot(file)
    assert "recursive model" in [element.text for element in ET.parse(file).iter(f"{SVG}text")]


def test_the_same_description_gives_the_same_file(tmp_path):
    """Text is text, and nothing is loaded from outside."""
    facts = describe(30, 2, "cycle", 4, exits=THROUGH)
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        facts.plot(file)
    content = files[0].read_text()
    assert files[1].read_text() == content
    assert "shared block, stored once" in content
    assert not any(outside in content for outside in ("<script", "@import", "url(http", "<image"))


def test_png(tmp_path):
    """Any format of matplotlib."""
    describe(30, 2, "cycle", 4).plot(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    """An unknown format, a missing folder, and a missing matplotlib."""
    with pytest.raises(SettingsError, match=r"layout.xyz' is not a supported image file name: .*Use .png or .svg"):
        describe(6, 2).plot(tmp_path / "layout.xyz")
    with pytest.raises(OutputError, match=r"Cannot write '.*nowhere.layout.svg': No such file .*Use another file name"):
        describe(6, 2).plot(Path(tmp_path / "nowhere" / "layout.svg"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingsError, match=r"Figures need matplotlib. Run: pip install 'recursify\[plot\]'"):
        describe(6, 2).plot(tmp_path / "layout.svg")
    assert not list(tmp_path.iterdir())
