"""Code that several test files share."""

import os
from pathlib import Path

import recursify

TESTS = Path(__file__).parents[1]
"""The folder of the tests."""


def python_path() -> str:
    """``PYTHONPATH`` for a process that imports ``helpers`` and this recursify."""
    return os.pathsep.join([str(TESTS), str(Path(recursify.__file__).parents[1])])
