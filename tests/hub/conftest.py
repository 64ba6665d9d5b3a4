"""A tiny recursive model as the commands leave it, and a Hub on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.loopback_hub import LoopbackHub
from helpers.tiny_models import save_tiny
from recursify.checkpoint.record import update_record
from recursify.convert.pipeline import convert_model

SETTINGS = {
    "initialization": "average",
    "relaxation": "svd",
    "lora_rank": 4,
    "num_prelude_layers": 1,
    "num_coda_layers": 1,
    "calibration_data": [],
}


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """Converted from a folder whose card says that it is under Apache-2.0, checked, and recorded."""
    home = tmp_path_factory.mktemp("hub")
    save_tiny(home / "dense")
    (home / "dense" / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\n---\n# Dense\n", encoding="utf-8"
    )
    convert_model(home / "dense", home / "recursive", **SETTINGS)
    return home / "recursive"


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A copy of it to do things to."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def trained(folder) -> Path:
    """The same with a history, as uptraining would leave it."""
    run = {
        "recursify_version": "0.1.0",
        "data_name": "/home/me/notes",
        "tokens": 30_000,
        "steps": 30,
        "settings": {"stage": "heal", "learning_rate": 1e-4, "data": ["/home/me/notes", "owner/stories"]},
        "hub_datasets": ["owner/stories"],
        "before": {},
        "after": {"perplexity": 17.25, "dense_ce": 2.5, "perplexity_depth_0": 300.0, "agreement_depth_0": 0.25},
    }
    update_record(folder, history=[run])
    return folder
