"""Every kernel in Triton against its reference, and faults planted into it: interpreted on a CPU, native on a GPU."""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from helpers import TESTS, python_path
from helpers.kernel_worker import kernel_names, names_of

pytest.importorskip("triton", reason="has wheels for Linux")

KERNELS = sorted(path.stem for path in (TESTS / "helpers" / "kernel_checks").glob("*.py"))
CHECKS = {kernel: importlib.import_module(f"helpers.kernel_checks.{kernel}") for kernel in KERNELS}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SEED = int(os.environ.get("RECURSIFY_SEED") or random.SystemRandom().randrange(2**31))


def cases(members) -> list:
    """One parameter per kernel, device and member; those of one kernel run in one worker."""
    return [
        pytest.param(kernel, device, name, id=f"{kernel}-{device}-{name}", marks=pytest.mark.xdist_group(kernel))
        for kernel in KERNELS
        for device in DEVICES
        for name in members(CHECKS[kernel], device)
    ]


@functools.cache
def results(kernel: str, device: str) -> tuple[dict[str, str | None], str]:
    """Errors by check or planted fault, and the exit of the process."""
    environment = os.environ | {"PYTHONPATH": python_path(), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    command = [sys.executable, "-m", "helpers.kernel_worker", kernel, device, str(SEED)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[")]
    return dict(lines), f"the process ended with {process.returncode} (seed {SEED})\n{process.stderr}"


@pytest.mark.parametrize(("kernel", "device", "check"), cases(lambda checks, device: names_of(checks)))
def test_kernel_equals_its_reference(kernel, device, check):
    """Every check passes in every dtype."""
    found, ending = results(kernel, device)
    assert check in found, ending
    assert found[check] is None, found[check]


@pytest.mark.parametrize(
    ("kernel", "device", "fault"), cases(lambda checks, device: checks.PLANTS if device == "cpu" else ())
)
def test_planted_fault_is_found(kernel, device, fault):
    """A planted fault, such as a mask that is off by one, makes its check fail by what it compares."""
    found, ending = results(kernel, device)
    assert fault in found, ending
    assert found[fault] is not None, f"no check failed (seed {SEED})"
    # The interpreter raises All-NaN itself where a maximum is taken over guard elements only.
    assert "AssertionError" in found[fault] or "All-NaN" in found[fault], found[fault]


def test_every_kernel_has_checks():
    """Every folder with a Triton source has a module of checks."""
    assert kernel_names() == KERNELS
