"""Griffe extension: rewrite reStructuredText roles of docstrings as Markdown, which mkdocstrings reads."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
"""``:class:`~recursify.modeling.LayerLayout` ``."""

LITERAL = re.compile(r"^(.*?)[ \t]*::$", re.MULTILINE)
"""A line before an indented block."""


class DocstringRoles(griffe.Extension):
    """Roles become code, and the mark of a literal block goes, since Markdown takes indented lines for one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = LITERAL.sub(lambda found: f"{found[1]}:" if found[1] else "", text)
