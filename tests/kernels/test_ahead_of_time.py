"""Kernels compile for GPUs that are not there, and spill no more registers than the table says."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import recursify
from helpers.kernel_worker import kernel_names

pytest.importorskip("triton", reason="has wheels for Linux")

pytestmark = pytest.mark.xdist_group("ahead of time")  # one worker compiles

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def spills(table: Path) -> dict[tuple[str, ...], int]:
    """Spilled bytes of every launch in a table."""
    key = ("kernel", "specimen", "launched", "capability")
    with table.open(encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in key): int(row["spill_bytes"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, ...], int]:
    """Spills of all specimens, compiled in a process that does not interpret, from an empty cache."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {
        "PYTHONPATH": str(Path(recursify.__file__).parents[1]),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, str(BENCHMARKS / "kernel_speed.py"), "--compile-only", "--output", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert process.returncode == 0, process.stderr
    return spills(folder / "kernels_aot.csv")


def test_spills_do_not_grow(compiled):
    """``benchmarks/results/kernels_aot.csv`` lists every launch, and the most that each may spill."""
    committed = spills(BENCHMARKS / "results" / "kernels_aot.csv")
    assert compiled.keys() == committed.keys()
    grown = {launch: count for launch, count in compiled.items() if count > committed[launch]}
    assert not grown


def test_every_kernel_is_compiled(compiled):
    """The kernels of the engine and those of the experiments, for both capabilities."""
    expected = {(kernel, capability) for kernel in kernel_names() for capability in ("80", "90")}
    assert {(kernel, capability) for kernel, _, _, capability in compiled} == expected
