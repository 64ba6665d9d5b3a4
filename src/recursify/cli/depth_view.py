"""Text with tokens coloured by their depth: on a terminal, and as an HTML page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from rich.color import Color
from rich.style import Style
from rich.text import Text

from recursify.errors import OutputError

SHALLOW, DEEP = (62, 124, 196), (214, 92, 38)
"""RGB colours of the first and the last depth; blue and orange are distinct for most colour-blind people."""


@dataclass(frozen=True)
class DepthView:
    """Prompt and its continuation.

    Attributes:
        prompt: Text of the prompt.
        pieces: Text that each new token adds; empty before the last token of a character that takes several.
        depths: Last recursion of each new token, from 0; -1 where none ran.
        num_depths: Number of recursions of the model.
    """

    prompt: str
    pieces: list[str]
    depths: list[int]
    num_depths: int

    def counts(self) -> dict[int, int]:
        """Number of tokens per depth, including depths without tokens."""
        return _counts(self.depths, self.num_depths)

    def for_terminal(self) -> Text:
        """Text in colours, with a legend."""
        text = Text(self.prompt)
        for piece, depth in zip(self.pieces, self.depths, strict=True):
            text.append(piece, depth_style(depth, self.num_depths))
        text.append("\n\n")
        return text.append_text(counts_by_depth(self.depths, self.num_depths))

    def write_page(self, file: Path) -> None:
        """Write the text as a self-contained page.

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
            raise OutputError(f"Cannot write '{file}': {error.strerror}. Use another file name.") from error


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


def counts_by_depth(depths: list[int], num_depths: int) -> Text:
    """Legend of the colours, with the number of tokens per depth."""
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
    """Colour of a token that exited after ``depth``."""
    return Style(color=Color.from_rgb(*_colour(depth, num_depths)))
