"""A layout as an SVG: what the description says is in the picture, whatever the layout."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest

from recursify.checkpoint.layout_picture import draw_svg
from recursify.modeling import LayerLayout

SVG = "{http://www.w3.org/2000/svg}"
THROUGH = {"head": "low_rank", "depths": [0, 1], "through_coda": True}
PAST = {"head": "norm", "depths": [0, 1], "through_coda": False}


def describe(num_layers: int, num_recursions: int, sharing: str = "cycle", ends: int = 0, **facts) -> dict[str, Any]:
    """What ``describe`` says of such a model, as far as it is drawn; ``ends``: layers of prelude, and of coda."""
    layout = LayerLayout.fold(num_layers, num_recursions, sharing, num_prelude_layers=ends, num_coda_layers=ends)
    return {
        "family": "llama",
        "layout": {
            "effective_layers": layout.num_layers,
            "unique_layers": layout.num_unique_layers,
            "prelude": layout.num_prelude_layers,
            "block_size": layout.block_size,
            "num_recursions": layout.num_recursions,
            "coda": layout.num_coda_layers,
            "order": layout.order,
        },
        "lora_rank": 64,
        "lora_rank_pattern": {},
        "parameters": {"stored": 109.9e6, "effective": 134.5e6, "shared": 38.9e6, "residuals": 14.3e6, "exits": 0},
        "exits": None,
        "exit_depth": None,
        "made_from": "smollm2-135m",
        **facts,
    }


def draw(*arguments, **facts) -> ET.Element:
    """The parsed picture of :func:`describe`."""
    return ET.fromstring(draw_svg(describe(*arguments, **facts)))


def words(picture: ET.Element) -> list[str]:
    """All that is written in it, in the order in which it is drawn."""
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def layers(picture: ET.Element) -> int:
    """How many boxes of layers there are."""
    return sum(element.get("class") == "layer" for element in picture.iter(f"{SVG}rect"))


def paths(picture: ET.Element) -> int:
    """How many arrows there are, loops and ways out among them."""
    return sum("marker-end" in element.attrib for element in picture.iter(f"{SVG}path"))


def test_cycle():
    """4 + (11 layers × 2) + 4, all parts in their order, one number a position, and one loop."""
    picture = draw(30, 2, "cycle", 4)
    assert words(picture) == [
        *["smollm2-135m, recursive", "llama, 4 + (11 layers × 2) + 4"],
        *["embedding", "prelude, once", "0", "1", "2", "3"],
        "shared block, stored once",
        *[str(position) for index in range(11) for position in (4 + index, 15 + index)],
        *["× 2", "coda, once", "26", "27", "28", "29", "final norm", "and head"],
        *["depth", "positions", "LoRA", "0", "4-14", "rank 64", "1", "15-25", "rank 64"],
        "layers: 19 stored, 30 effective",
        "parameters: 109.9M stored (38.9M shared, 14.3M LoRA), 134.5M effective",
    ]
    assert layers(picture) == 19
    assert paths(picture) == 4 + 1


def test_sequence():
    """Every shared layer has a loop of its own."""
    picture = draw(32, 3, "sequence", 1)
    assert {"each × 3", "1, 4, …, 28", "2, 5, …, 29", "3, 6, …, 30"} <= set(words(picture))
    assert words(picture)[5:9] == ["shared block, stored once", "1", "2", "3"]
    assert paths(picture) == 4 + 10


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_one_recursion(sharing):
    """Nothing loops, and there is no prelude or coda where the model has none."""
    picture = draw(6, 1, sharing)
    assert ("each × 1" if sharing == "sequence" else "× 1") in words(picture)
    assert not {"prelude, once", "coda, once"} & set(words(picture))
    assert paths(picture) == 2


@pytest.mark.parametrize(
    ("rank", "pattern", "residual"),
    [
        (0, {}, "no residual"),
        (8, {"mlp.down_proj": 128, "3.self_attn.q_proj": 32}, "rank 8, 2 of their own"),
        (0, {"mlp.down_proj": 128}, "no residual, 1 of their own"),
    ],
)
def test_residuals(rank, pattern, residual):
    """One at every depth."""
    assert words(draw(12, 3, lora_rank=rank, lora_rank_pattern=pattern)).count(residual) == 3


@pytest.mark.parametrize(
    ("ends", "exits", "head"),
    [
        (2, THROUGH, "low_rank head, through the coda"),
        (2, PAST, "norm head, past the coda"),
        (0, THROUGH, "low_rank head"),
        (0, PAST, "norm head"),
    ],
)
def test_exits(ends, exits, head):
    """After which depths, by which head, and from which end of the coda if there is one."""
    picture = draw(12 + 2 * ends, 3, "cycle", ends, exits=exits)
    assert {"exit after depth 0-1", head} <= set(words(picture))
    branch = int(next(element.get("cx") for element in picture.iter(f"{SVG}circle")))
    coda = [int(rect.get("x")) for rect in picture.iter(f"{SVG}rect") if rect.get("class") == "once"][-1:]
    assert all((branch > x) is exits["through_coda"] for x in coda)
    assert "not run" not in words(picture)


@pytest.mark.parametrize(
    ("exits", "head"), [(PAST, "norm head, past the coda"), (None, "shared head, through the coda")]
)
def test_exit_depth(exits, head):
    """A fixed depth: later ones do not run. A model without exit heads reads out with its own."""
    written = words(draw(14, 3, "cycle", 1, exits=exits, exit_depth=0))
    assert {"every token exits after depth 0", head} <= set(written)
    assert written.count("rank 64") == 1
    assert written.count("not run") == 2


def test_exit_depth_among_elided_ones():
    """The row that stands for several depths says how far they run."""
    written = words(draw(32, 16, exit_depth=5))
    assert written.count("rank 64") == 2
    assert written.count("rank 64, run to depth 5") == 1
    assert written.count("not run") == 2


def test_routers():
    """A diamond before the block, to which the loop leads back."""
    picture = draw(14, 3, "cycle", 1, routers={"kind": "expert_choice", "depths": [0, 1, 2]})
    assert {"expert_choice router", "at depth 0-2"} <= set(words(picture))
    assert sum(element.get("class") == "router" for element in picture.iter(f"{SVG}path")) == 1


@pytest.mark.parametrize(
    ("arguments", "elided"),
    [
        ((80, 3, "cycle", 4), {"10…22", "34…46", "58…70"}),
        ((80, 2, "sequence", 1), {"13…67", "14…68"}),
        ((80, 2, "cycle", 30), {"3…27", "53…77"}),
        ((80, 1, "cycle"), {"6…74"}),
        ((80, 80, "cycle"), {"⋮", "2…77", "2-77"}),
        ((80, 8, "sequence"), {"⋮", "2…5", "2, 3, …, 77"}),
    ],
)
def test_deep_models(arguments, elided):
    """80 layers are no wider than a screen, and what is left out is named."""
    exits = THROUGH if arguments[1] == 3 else None
    picture = draw(*arguments, exits=exits)
    assert elided <= set(words(picture))
    assert layers(picture) <= 6 + 12 + 6
    assert int(picture.get("width")) <= 1400
    assert int(picture.get("height")) <= 600


def test_nothing_leaves_the_sheet_or_covers_another():
    """Every box is inside, and parts stand beside one another."""
    picture = draw(80, 3, "cycle", 4, exits=PAST, exit_depth=1, routers={"kind": "token_choice", "depths": [0]})
    sheet, *boxes = [
        [float(rect.get(name)) for name in ("x", "y", "width", "height")] for rect in picture.iter(f"{SVG}rect")
    ]
    assert all(x > 0 and x + width < sheet[2] and y > 0 and y + height < sheet[3] for x, y, width, height in boxes)
    parts = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("class") in ("once", "shared", "end")]
    spans = [(int(rect.get("x")), int(rect.get("x")) + int(rect.get("width"))) for rect in parts]
    assert [rect.get("class") for rect in parts] == ["end", "once", "shared", "once", "end", "shared"]
    assert all(end < begin for (_, end), (begin, _) in pairwise(spans[:5]))


def test_any_name_is_valid_xml():
    """Markup, control characters and lone surrogates, which folder names can have; of a path, its end."""
    picture = draw(6, 2, made_from="/home/me/a & b <c>\x00\udc80")
    assert words(picture)[0] == "a & b <c>\ufffd\ufffd, recursive"
    assert picture.find(f"{SVG}title").text == "Layout of a & b <c>\ufffd\ufffd, recursive: 0 + (3 layers × 2) + 0"
    assert words(draw(6, 2, made_from=None))[0] == "a recursive model"


def test_self_contained():
    """The same text each time, a sheet behind it, a name and a description for screen readers, nothing from outside."""
    facts = describe(30, 2, "cycle", 4, exits=THROUGH)
    text = draw_svg(facts)
    picture = ET.fromstring(text)
    assert draw_svg(facts) == text
    assert [element.tag.removeprefix(SVG) for element in picture][:5] == ["title", "desc", "style", "marker", "rect"]
    assert picture.get("aria-labelledby") == "title desc"
    assert "prelude   layers 0-3, once\nblock     11 shared layers × 2" in picture.find(f"{SVG}desc").text
    assert not any(outside in text for outside in ("href", "<script", "@import", "url(http"))
