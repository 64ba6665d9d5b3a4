"""Ahead-of-time compilation of Triton kernels for GPUs that are not present, and their resource usage.

A launcher called with tensors on the meta device computes nothing. :func:`recorded` records the launches it would make,
with types, constants and warps, and :func:`compiled` compiles them as the first launch on a GPU would: with the same
specialization on sizes divisible by 16.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        function: Kernel.
        arguments: Arguments by name.
        options: Compiler options: ``num_warps``, ``num_stages``.
        grid: Number of programs along each axis.
    """

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.function.__name__


@dataclass(frozen=True)
class Footprint:
    """Resource usage of a compiled kernel.

    Attributes:
        kernel: Name of the kernel.
        capability: Compute capability of the GPU, such as 80 or 90.
        num_warps: Warps per program.
        registers: Registers per thread, at most 255.
        shared_bytes: Shared memory per program.
        spill_bytes: Bytes per thread spilled from registers.
        tensor_core_ops: Number of matrix instructions in the code.
    """

    kernel: str
    capability: int
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    tensor_core_ops: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches inside this context instead of making them."""
    launches: list[Launch] = []

    def record(function, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in function.params]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        options = {name: arguments.pop(name) for name in list(arguments) if name not in names}
        launches.append(Launch(function, arguments, options, tuple(grid)))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compiled(launch: Launch, capability: int) -> Footprint:
    """Compile ``launch`` for NVIDIA GPUs of ``capability``.

    Raises:
        Exception: Triton or ptxas cannot compile it.
    """
    signature, constants, attributes = _specialization(launch)
    source = ASTSource(launch.function, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, spills = _resources(binary.asm["cubin"])
    return Footprint(
        kernel=launch.name,
        capability=capability,
        num_warps=binary.metadata.num_warps,
        registers=registers,
        shared_bytes=binary.metadata.shared,
        spill_bytes=spills,
        tensor_core_ops=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", binary.asm["ptx"])),
    )


def _specialization(launch: Launch) -> tuple[dict[str, str], dict, dict]:
    """Types, constants and divisibility by 16 of the parameters, determined as in Triton's just-in-time compiler."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        kind = _type_of(value)
        if parameter.is_constexpr or kind == "constexpr":
            signature[parameter.name], constants[index,] = "constexpr", value
            continue
        signature[parameter.name] = kind
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value is None or isinstance(value, bool) or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from cuobjdump, which Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump.stdout)
    assert found, dump.stdout
    # Spilled registers are on the stack, and our kernels put nothing else there.
    return int(found[1]), int(found[2])
