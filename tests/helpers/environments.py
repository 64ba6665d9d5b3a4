"""Virtual environments with chosen packages and nothing else, made of links instead of downloads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed_by(*names: str) -> Iterator[Distribution]:
    """The installed distributions that ``names`` require, themselves included, without extras."""
    seen: set[str] = set()
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # needed on other systems only
        yield found
        requirements = map(Requirement, found.requires or [])
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def make_environment(folder: Path, *names: str) -> Path:
    """Make a virtual environment with links to ``names`` and what they require; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    link_packages(folder, *needed_by(*names))
    return folder / "bin" / "python"


def link_packages(folder: Path, *found: Distribution) -> None:
    """Link the files of distributions into the virtual environment ``folder``, as if they had been installed."""
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in found:
        for name in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(package.locate_file(name))))
