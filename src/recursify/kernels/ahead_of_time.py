"""Compiling Triton kernels for a GPU that is not there, and what they take of it.

A launcher that is called with tensors on the meta device computes nothing, but shows which kernels it would launch,
with which types, constants and warps. :func:`recorded` writes those launches down, and :func:`compiled` compiles them,
as the first launch on a GPU would: with the same specializations on sizes that 16 divides.
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
    """A kernel as it would be launched.

    Attributes:
        function: The kernel.
        arguments: By name.
        options: ``num_warps``, ``num_stages``.
        grid: Programs along each axis.
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
    """What a program of a compiled kernel takes.

    Attributes:
        kernel: Its name.
        capability: Of the GPU: 80, 90.
        num_warps: Per program.
        registers: Per thread; 255 at most.
        shared_bytes: Shared memory per program.
        spill_bytes: Per thread, of registers that did not suffice.
        tensor_core_ops: Matrix instructions in the code.
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
    """The launches inside this context, none of which happens."""
    launches: list[Launch] = []

    def record(function, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in function.params]
        given = dict(zip(names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in list(given) if name not in names}
        launches.append(Launch(function, given, options, tuple(grid)))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compiled(launch: Launch, capability: int) -> Footprint:
    """Compile ``launch`` for NVIDIA's GPUs of ``capability``.

    Raises:
        Exception: Triton or ptxas refuses it.
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
    """Types by parameter, constants, and which arguments 16 divides, as Triton's just-in-time compiler decides them."""
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
    """Registers and spilled bytes per thread, by cuobjdump, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout)
    assert found, shown.stdout
    # What is spilled lies on the stack, on which none of our kernels has anything else.
    return int(found[1]), int(found[2])
