"""Selection of a kernel's implementation by device.

Every kernel has two modules with the same functions: ``reference.py`` defines them in plain PyTorch and runs on any
device; ``triton.py`` takes one or two launches on a GPU. It is imported on first use, so nothing here needs Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib import import_module
from typing import Any, Literal

import torch

Implementation = Literal["auto", "reference", "triton"]

IMPLEMENTATIONS = ("auto", "reference", "triton")
"""Values of a kernel's ``implementation=``; ``auto`` selects Triton where it can compile for the device."""

OLDEST_CAPABILITY = (8, 0)
"""First NVIDIA compute capability with bfloat16 matrix instructions, which kernels need for bfloat16 inputs."""


def implementation_on(device: torch.device, implementation: Implementation = "auto") -> Literal["reference", "triton"]:
    """Name of the implementation that runs on ``device``.

    Raises:
        ValueError: ``implementation`` is not one of :data:`IMPLEMENTATIONS`.
        RuntimeError: Triton is requested and cannot run there.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation '{implementation}'. Use one of: {', '.join(IMPLEMENTATIONS)}.")
    reason = None if implementation == "reference" else why_not_triton(device)
    if implementation == "triton" and reason:
        raise RuntimeError(f"implementation 'triton' cannot run on '{device}': {reason}. Use 'auto' or 'reference'.")
    return "reference" if implementation == "reference" or reason else "triton"


def load_implementation(package: str, device: torch.device, implementation: Implementation) -> Any:
    """Module of a kernel's ``package`` that runs on ``device``, by :func:`implementation_on`."""
    return import_module(f"{package}.{implementation_on(device, implementation)}")


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """Reason why Triton cannot run on ``device``; None if it can.

    The meta device counts as a GPU, since launches on it are recorded (:mod:`.ahead_of_time`). The CPU counts as one
    if ``TRITON_INTERPRET=1`` is set in the environment.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "meta" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if device.type != "cuda":
        return "Triton compiles for GPUs"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, and kernels need {OLDEST_CAPABILITY[0]}.0"
    return None


@functools.cache
def programs_to_fill(device: torch.device) -> int:
    """Number of programs that keep ``device`` busy: two per multiprocessor, 132 of them if the device is not a GPU.

    It is 1 in the interpreter, where each program is slow.
    """
    if device.type == "cpu":
        return 1
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return 2 * 132
