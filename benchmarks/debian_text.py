"""Text of another domain, from a Debian package: its HTML pages or reStructuredText sources as plain files.

::

    python benchmarks/debian_text.py debian-handbook --only en-US -o text/

Needs ``apt-get`` and ``dpkg-deb``. Packages that serve: ``debian-handbook``, ``python3.11-doc``, ``anarchism``.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "head", "nav"}
BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "tr", "dt", "dd", "br"}
FEWEST_CHARACTERS = 1000
"""Shorter pages are tables of contents."""


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in SKIPPED

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def plain(file: Path) -> str:
    """The text of an HTML page, one paragraph a line; other files as they are."""
    content = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".html":
        return content
    words = _Words()
    words.feed(content)
    lines = (" ".join(line.split()) for line in "".join(words.parts).split("\n"))
    return "\n\n".join(line for line in lines if line)


def main() -> None:
    """Download, unpack, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package")
    parser.add_argument("--only", default="", help="only files with this in their path")
    parser.add_argument("--output", "-o", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", "-q", arguments.package], cwd=scratch, check=True)
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, "unpacked"], cwd=scratch, check=True)
        files = [
            file
            for file in sorted(Path(scratch, "unpacked").rglob("*"))
            if file.name.endswith((".html", ".rst.txt")) and file.is_file() and not file.is_symlink()
        ]
        documents = [plain(file) for file in files if arguments.only in str(file.relative_to(scratch))]
    documents = [document for document in dict.fromkeys(documents) if len(document) >= FEWEST_CHARACTERS]
    for index, document in enumerate(documents):
        (arguments.output / f"{index:04}.txt").write_text(document, encoding="utf-8")
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} million characters in {arguments.output}")


if __name__ == "__main__":
    main()
