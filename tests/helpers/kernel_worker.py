"""Run the checks of one kernel, in a process of its own because an access out of bounds ends it.

    python -m helpers.kernel_worker KERNEL DEVICE SEED

The kernel is checked unchanged, and then with each fault of the checks' ``PLANTS`` in its source, which a check has to
find. Prints one line of JSON per result.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

import torch

import recursify
from helpers.kernel_bench import Bench

PACKAGES = ("recursify.kernels", "recursify.experiments.kernels")
"""Packages with a folder per kernel."""

DTYPES = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
"""Dtypes by device. The interpreter's bfloat16 arithmetic is wrong, and gives no warning."""


def names_of(checks: ModuleType) -> list[str]:
    """The checks in a module."""
    return [name for name in vars(checks) if name.startswith("check_")]


def error_of(checks: ModuleType, name: str, device: str, seed: int) -> str | None:
    """Run the check ``name`` in every dtype; returns the first error, or None."""
    for dtype in getattr(checks, "DTYPES", DTYPES[device]):
        bench = Bench(device, dtype, seed)
        try:
            with bench.poisoned():
                getattr(checks, name)(bench)
                if device == "cuda":
                    torch.cuda.synchronize()
        except Exception:
            return f"{dtype}, seed {seed}\n{traceback.format_exc()}"
    return None


def kernel_names() -> list[str]:
    """Names of all kernels that have a Triton source, sorted."""
    root = Path(recursify.__file__).parents[1]
    sources = (source for package in PACKAGES for source in (root / package.replace(".", "/")).glob("*/triton.py"))
    return sorted(source.parent.name for source in sources)


def package_of(kernel: str) -> str:
    """The package of a kernel, among those that the engine calls or the experiments."""
    for parent in PACKAGES:
        if importlib.util.find_spec(f"{parent}.{kernel}"):
            return f"{parent}.{kernel}"
    raise ValueError(kernel)


def plant(kernel: str, old: str, new: str, folder: Path) -> None:
    """Replace ``old`` by ``new`` in the Triton source that the kernel's package uses."""
    package = importlib.import_module(package_of(kernel))
    source = (Path(package.__file__).parent / "triton.py").read_text(encoding="utf-8")
    assert old in source, f"{old!r} is not in the source"
    path = folder / f"planted_{abs(hash((old, new)))}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.triton", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    package.triton = module


def main(kernel: str, device: str, seed: int) -> None:
    torch.set_num_threads(1)
    checks = importlib.import_module(f"helpers.kernel_checks.{kernel}")
    for name in names_of(checks):
        print(json.dumps([name, error_of(checks, name, device, seed)]), flush=True)
    if device != "cpu":
        return  # a fault that reads out of bounds would end the context
    with tempfile.TemporaryDirectory() as folder:
        for label, (old, new, check) in checks.PLANTS.items():
            plant(kernel, old, new, Path(folder))
            print(json.dumps([label, error_of(checks, check, device, seed)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
