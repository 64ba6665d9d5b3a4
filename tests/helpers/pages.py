"""What the documentation is made of: fenced blocks, the commands in them, links."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SHELLS = ("sh", "bash", "console")
REPOSITORY = "https://github.com/recursify/recursify"

FENCE = re.compile(r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`(recursify(?: [^`\n]+)?)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SEPARATORS = ("|", "&&", ";", "||")


def named(page: Path) -> str:
    """The page's name in a report."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page.
        line: Where its text begins, counted from 1.
        language: After the fence.
        title: The file that it shows, where it says so.
        text: What is in it.
    """

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One ``recursify`` command of a page.

    Attributes:
        where: Where it stands.
        arguments: What follows ``recursify``.
        piped: What ``echo`` pipes into it.
        launched: By a launcher of several processes.
    """

    where: str
    arguments: tuple[str, ...]
    piped: str | None = None
    launched: bool = False

    def __str__(self) -> str:
        return f"{self.where}: recursify {shlex.join(self.arguments)}"

    @property
    def flow(self) -> tuple[str, frozenset[str]]:
        """What makes it another one: the sub-command, and which options it has."""
        return self.arguments[0], frozenset(word for word in self.arguments if word.startswith("-"))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of ``page`` in one of ``languages``."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start("text")) + 1, match["language"], match["title"], match["text"])
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """The text of ``page`` outside fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[Command]:
    """The ``recursify`` commands in shell blocks of ``page``, in their order."""
    return [
        command
        for block in blocks(page, *SHELLS)
        for line in block.text.replace("\\\n", " ").splitlines()
        for command in commands_in(line.removeprefix("$ "), str(block))
    ]


def commands_in(line: str, where: str) -> Iterator[Command]:
    """The ``recursify`` commands in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    piped = None
    for words in _split(list(lexer)):
        if (found := _recursify_arguments(words)) is not None:
            arguments, launched = found
            yield Command(where, arguments, piped, launched)
        piped = " ".join(words[1:]) if words[0] == "echo" else None


def _split(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, ";"]:
        if word in SEPARATORS:
            if part:
                yield part
            part = []
        else:
            part.append(word)


def _recursify_arguments(words: list[str]) -> tuple[tuple[str, ...], bool] | None:
    """What follows ``recursify``, and whether a launcher starts it; None where it is another program."""
    if Path(words[0]).name == "recursify":
        return tuple(words[1:]), "--num-processes" in words
    for index in range(len(words) - 1):
        if words[index : index + 2] == ["-m", "recursify"]:
            return tuple(words[index + 2 :]), True
    return None


def spans(page: Path) -> list[str]:
    """The ``recursify`` commands in the running text of ``page``."""
    return SPAN.findall(prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and pictures of ``page``."""
    return LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What a link into ``page`` may name: its headings, and those of files that it takes in whole."""
    text = prose(page)
    whole = re.findall(r'^--8<-- "([^":]+)"$', page.read_text(encoding="utf-8"), re.M)
    headings = re.findall(r"^#+ (.*)$", "\n".join([text, *(prose(ROOT / name) for name in whole)]), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def navigation() -> list[str]:
    """The pages in the site's navigation."""

    def pages(entries: list) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                yield from [target] if isinstance(target, str) else pages(target)

    return list(pages(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))


def apply_diff(text: str) -> dict[str, str]:
    """The files that a diff without line numbers changes, as they are afterwards.

    Raises:
        AssertionError: What it changes is not in a file exactly once.
    """
    changed: dict[str, str] = {}
    for part in re.split(r"^--- a/", text, flags=re.M)[1:]:
        header, *hunks = re.split(r"^@@\n", part, flags=re.M)
        name = header.splitlines()[0]
        content = (ROOT / name).read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines()
            before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "-"))
            after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "+"))
            assert content.count(before) == 1, f"{name} does not have exactly once:\n{before}"
            content = content.replace(before, after)
        changed[name] = content
    return changed
