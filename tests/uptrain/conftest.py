"""The run that several files compare others with."""

from __future__ import annotations

import pytest

from helpers.runs import BASE, make_source
from recursify.uptrain.run import uptrain_model


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Folder of a recursive model, with its dense teacher beside it."""
    return make_source(tmp_path_factory.mktemp("uptrain"))


@pytest.fixture(scope="session")
def plain(source, tmp_path_factory):
    """Output and result of an uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    return output, uptrain_model(source, output, settings=BASE)
