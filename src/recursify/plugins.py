"""Lookup of named parts: built-in ones, and entry points of installed packages.

``[project.entry-points."recursify.stages"]`` in the ``pyproject.toml`` of a package adds a stage of uptraining, for
example. Our own experiments are registered in the same way, so the core does not import them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from recursify.errors import RecursifyError

Part = TypeVar("Part")


def names(group: str, builtin: Mapping[str, object]) -> list[str]:
    """Names in a group, the built-in ones first.

    Args:
        group: Entry-point group, ``recursify.stages`` for example.
        builtin: Mapping from names to built-in parts.
    """
    return [*builtin, *sorted(entry.name for entry in entry_points(group=group) if entry.name not in builtin)]


def find(
    group: str, name: str, builtin: Mapping[str, Part], *, kind: str, error: Callable[[str], RecursifyError]
) -> Part:
    """Part called ``name``; entry points are imported here.

    Args:
        group: Entry-point group.
        name: Name that the user gave.
        builtin: Mapping from names to built-in parts.
        kind: Noun for the message, ``stage`` for example.
        error: Class of the error for an unknown name.

    Raises:
        RecursifyError: Unknown name; the message lists the known ones.
    """
    if name in builtin:
        return builtin[name]
    for entry in entry_points(group=group, name=name):
        return entry.load()
    raise error(f"Unknown {kind} '{name}'. Use one of: {', '.join(names(group, builtin))}.")
