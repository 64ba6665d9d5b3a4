"""One server for all tests that do not break it."""

from __future__ import annotations

import pytest

from helpers.running import running


@pytest.fixture(scope="session")
def server():
    """A tiny model with exits, served without a key."""
    with running() as made:
        yield made
