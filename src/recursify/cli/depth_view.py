"""A text whose tokens are coloured by the depth that they were read at: on a terminal, and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.color import Color
from rich.style import Style
from rich.text import Text

from recursify.errors import OutputError

SHALLOW, DEEP = (62, 124, 196), (214, 92, 38)
"""Colours of the first depth and of the last, red, green, blue; blue and orange are told apart by most colour-blind."""

UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class DepthView:
    """A prompt and what was written after it.

    Attributes:
        prompt: As it was given.
        pieces: The text of each new token; empty where a character takes several, before the last of them.
        depths: The last recursion, from 0, of the forward that each new token was read from; -1 where none ran.
        num_depths: Recursions of the model, or, with exits after layers, the exits and the end.
    """

    prompt: str
    pieces: list[str]
    depths: list[int]
    num_depths: int

    def counts(self) -> dict[int, int]:
        """Tokens per depth, those skipped by all tokens included."""
        return _counts(self.depths, self.num_depths)

    def for_terminal(self) -> Text:
        """The text in colours, and under it what they stand for."""
        text = Text(self.prompt)
        for piece, depth in zip(self.pieces, self.depths, strict=True):
            text.append(piece, depth_style(depth, self.num_depths))
        text.append("\n\n")
        return text.append_text(counts_by_depth(self.depths, self.num_depths))

    def write_page(self, file: Path) -> None:
        """Write the text as a page that needs nothing else.

        Raises:
            OutputError: The file cannot be written.
        """
        rules = "\n".join(
            f".d{depth + 1} {{ background: rgb({', '.join(map(str, _colour(depth, self.num_depths)))}) }}"
            for depth in self.counts()
        )
        legend = "\n".join(
            f'<li><span class="d{depth + 1}">{_name(depth)}</span> {count} tokens</li>'
            for depth, count in self.counts().items()
        )
        spans = "".join(
            f'<span class="d{depth + 1}" title="{_name(depth)}">{html.escape(piece)}</span>'
            for piece, depth in zip(self.pieces, self.depths, strict=True)
        )
        page = PAGE.format(rules=rules, legend=legend, prompt=html.escape(self.prompt), spans=spans)
        try:
            file.write_text(page, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"Cannot write '{file}': {error.strerror}. Name another --depth-page.") from error


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Tokens by depth</title>
<style>
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere }}
ul {{ list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 1rem }}
span {{ color: white; border-radius: 3px; padding: 1px 0 }}
li span {{ padding: 1px 6px }}
{rules}
</style>
<h1>Tokens by depth</h1>
<ul>
{legend}
</ul>
<p>{prompt}{spans}</p>
</html>
"""


def token_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it; together they are the whole."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A part of a character decodes to a sign for what cannot be read, until the rest has come.
        whole = text if end == len(ids) else text.rstrip(UNREADABLE)
        pieces.append(whole[len(shown) :])
        shown = whole if len(whole) > len(shown) else shown
    return pieces


def counts_by_depth(depths: list[int], num_depths: int) -> Text:
    """What the colours stand for, and how many tokens have each."""
    text = Text()
    for depth, count in _counts(depths, num_depths).items():
        text.append(f"■ {_name(depth)}", depth_style(depth, num_depths))
        text.append(f" {count}  ")
    return text


def _counts(depths: list[int], num_depths: int) -> dict[int, int]:
    named = [*([-1] if -1 in depths else []), *range(num_depths)]
    return {depth: depths.count(depth) for depth in named}


def _name(depth: int) -> str:
    return f"depth {depth}" if depth >= 0 else "no recursion"


def _colour(depth: int, num_depths: int) -> tuple[int, ...]:
    if depth < 0:
        return (128, 128, 128)
    part = depth / max(num_depths - 1, 1)
    return tuple(round(start + part * (end - start)) for start, end in zip(SHALLOW, DEEP, strict=True))


def depth_style(depth: int, num_depths: int) -> Style:
    """The colour of a token that was read after ``depth``."""
    return Style(color=Color.from_rgb(*_colour(depth, num_depths)))
