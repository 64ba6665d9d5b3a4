"""Lint of docstrings and help texts: they open with a noun phrase or an imperative verb, arguments with a noun.

    python scripts/check_prose.py [PATH ...]

Checked are docstrings of modules, classes and functions, the entries of their ``Args:`` and ``Attributes:`` sections,
the strings that document a module's or a class's variables, and comments. Prints one line per fault; exits 1 if there
is any.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# fmt: off
FRAGMENTS = frozenset({
    "what", "whatever", "whether", "how", "of", "which", "who", "whose", "whom", "where", "when", "while", "why",
    "as", "by", "so", "that", "than", "if", "because", "until", "in", "on", "at", "with", "without", "from", "to",
    "into", "for", "after", "before", "between", "above", "below", "under", "over",
})
"""First words that make a fragment of a sentence: relative and question words, conjunctions, prepositions."""

NOT_NOUNS = FRAGMENTS | frozenset({
    "per", "see", "none", "told", "called", "made", "given", "taken", "its", "their", "it", "they", "and", "or",
    "not", "also",
})
"""First words that the description of an argument or an attribute does not open with."""
# fmt: on

PHRASES = re.compile(r"\bso (?:many|much|often)\b(?! (?:that|as))|\bwhose\.(?:\s|$)", re.IGNORECASE)
"""N is "N" or "this many"; a description has a noun."""

SECTION = re.compile(r"^(?:Args|Arguments|Attributes):\s*$")
ENTRY = re.compile(r"^(?P<indent> +)[*\w, `\[\]|.]+?(?: \([^)]*\))?: +(?P<text>\S.*)$")

Fault = tuple[Path, int, str]


def first_word(text: str) -> str:
    """The first word of ``text`` in lower case, without the marks around it."""
    return text.split(maxsplit=1)[0].strip("`'\"*_.,:;()[]").lower() if text.strip() else ""


def entries(docstring: str) -> Iterator[tuple[int, str]]:
    """Line offset and description of every entry in the ``Args:`` and ``Attributes:`` sections of a docstring."""
    inside, indent = False, 0
    for offset, line in enumerate(docstring.splitlines()):
        bare = line.strip()
        if SECTION.match(bare):
            inside, indent, section_indent = True, 0, len(line) - len(line.lstrip())
            continue
        if not inside or not bare:
            continue
        depth = len(line) - len(line.lstrip())
        if depth <= section_indent:
            inside = False
            continue
        indent = indent or depth
        if depth == indent and (entry := ENTRY.match(line)):
            yield offset, entry["text"]


def documented(tree: ast.Module) -> Iterator[tuple[ast.Constant, bool]]:
    """Every documenting string with whether it documents a variable instead of a module, class or function."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for index, statement in enumerate(node.body):
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                continue
            if not isinstance(statement.value.value, str):
                continue
            before = node.body[index - 1] if index else None
            if index == 0:
                yield statement.value, False
            elif isinstance(before, ast.Assign | ast.AnnAssign):
                yield statement.value, True


def faults_in(file: Path) -> Iterator[Fault]:
    """Every fault in one file."""
    source = file.read_text(encoding="utf-8")
    for string, is_variable in documented(ast.parse(source)):
        text = str(string.value)
        word = first_word(text)
        if word in (NOT_NOUNS if is_variable else FRAGMENTS) or word == "raises":
            yield file, string.lineno, f"opens with a fragment: {text.strip().splitlines()[0][:80]!r}"
        for offset, description in entries(text):
            if first_word(description) in NOT_NOUNS:
                yield file, string.lineno + offset, f"has an entry without a noun: {description[:80]!r}"
        for found in PHRASES.finditer(text):
            line = string.lineno + text.count("\n", 0, found.start())
            yield file, line, f"has the phrase {found[0].strip()!r}"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (found := PHRASES.search(token.string)):
            yield file, token.start[0], f"has the phrase {found[0].strip()!r}"


def main(paths: list[str]) -> int:
    """Print the faults under ``paths``, by default the source; returns the exit code."""
    roots = [Path(path) for path in paths] or [Path("src"), Path("scripts")]
    files = [file for root in roots for file in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
    faults = sorted(fault for file in files for fault in faults_in(file))
    for file, line, what in faults:
        print(f"{file}:{line} {what}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
