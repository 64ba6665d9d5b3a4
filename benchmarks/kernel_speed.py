"""Speed of the kernels relative to the hardware's limits, and their resource usage compiled without a GPU.

    python benchmarks/kernel_speed.py

On a GPU, every call of ``kernel_specimens.py`` is timed as a CUDA graph with a cold cache, and so are PyTorch, compiled
PyTorch and a library where there is one. The bound is set by the bytes and operations of the call, with the rates of a
copy and a large product of the same run: ``results/kernels.*``. Without a GPU nothing is timed.

If Triton is installed, the same calls are compiled ahead of time for compute capabilities 8.0 and 9.0, without a GPU:
``results/kernels_aot.*``. Tests compare register spills with that table.

(The name ``kernels.py`` would shadow Hugging Face's package of that name.)
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import gpu_timing
from kernel_specimens import SPECIMENS, VARIANTS
from keyed_results import markdown_table

RESULTS = Path(__file__).parent / "results"
CAPABILITIES = (80, 90)
FORMS = ("triton", "torch", "compiled", "library")
AOT_COLUMNS = (
    *("kernel", "specimen", "launched", "capability", "grid", "warps"),
    *("registers", "shared_bytes", "spill_bytes", "tensor_core_ops", "triton"),
)


def compile_all() -> list[dict[str, Any]]:
    """Compile all specimens; one row per specimen, launch and capability."""
    import triton

    from recursify.kernels.ahead_of_time import compiled, recorded

    rows = []
    for specimen in [*SPECIMENS, *VARIANTS]:
        with recorded() as launches:
            specimen.build(torch.device("meta"))["triton"]()
        for launch in launches:
            for capability in CAPABILITIES:
                footprint = compiled(launch, capability)
                rows.append(
                    {
                        "specimen": specimen.case,
                        "kernel": specimen.kernel,
                        "launched": footprint.kernel,
                        "capability": capability,
                        "grid": "×".join(map(str, launch.grid)),
                        "warps": footprint.num_warps,
                        "registers": footprint.registers,
                        "shared_bytes": footprint.shared_bytes,
                        "spill_bytes": footprint.spill_bytes,
                        "tensor_core_ops": footprint.tensor_core_ops,
                        "triton": triton.__version__,
                    }
                )
    return rows


def write_aot(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the table as CSV and Markdown."""
    write_csv(rows, AOT_COLUMNS, output)
    lines = [
        [
            f"`{row['launched']}`",
            row["specimen"],
            *(str(row[name]) for name in ("grid", "capability", "warps", "registers", "shared_bytes", "spill_bytes")),
            str(row["tensor_core_ops"]),
        ]
        for row in rows
    ]
    head = ["launch", "call", "programs", "capability", "warps", "registers", "shared bytes", "spilled bytes", "mma"]
    text = f"""# Kernels compiled without a GPU

Made by `python benchmarks/kernel_speed.py` with Triton {rows[0]["triton"]}; figures in `kernels_aot.csv`.

Each launch of `benchmarks/kernel_specimens.py` in bfloat16, compiled for NVIDIA's compute capabilities 8.0 (A100) and
9.0 (H100) as its first call there would compile it. *Registers* and *spilled bytes* are per thread, *shared bytes* per
program; *mma* counts matrix instructions in the code. The table shows that the kernels compile, fit and use tensor
cores. It does not show their speed: they have not run on a GPU yet.

{markdown_table(head, lines)}
"""
    output.with_suffix(".md").write_text(text, encoding="utf-8")


def time_all() -> Iterator[dict[str, Any]]:
    """Time all specimens; one row per specimen with microseconds per form and the bound."""
    flush = gpu_timing.make_flush()
    bandwidth, rate = gpu_timing.copy_bandwidth(flush), gpu_timing.product_rate(flush)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "copy_GB_per_s": round(bandwidth / 1e9),
        "product_TFLOP_per_s": round(rate / 1e12),
    }
    for specimen in SPECIMENS:
        forms = specimen.build(torch.device("cuda"))
        if not specimen.waits:
            torch._dynamo.reset()
            forms["compiled"] = torch.compile(forms["torch"], dynamic=False)
        times = {}
        for name, form in forms.items():
            graphed = name == "triton" or not specimen.waits
            times[name] = time_of(form, graphed, flush)
        bound = max(specimen.moved / bandwidth, specimen.operations / rate)
        row = {"kernel": specimen.kernel, "specimen": specimen.case, "bound_us": round(bound * 1e6, 2)}
        row |= {f"{name}_us": times.get(name, "") for name in FORMS}
        print(row, flush=True)
        yield row | {"torch_graphed": not specimen.waits} | about
        del forms
        torch.cuda.empty_cache()


def time_of(form: Callable[[], Any], graphed: bool, flush: torch.Tensor) -> float | str:
    """Microseconds of a form, or the reason why it cannot run here."""
    try:
        call = gpu_timing.captured(form) if graphed else form
        return round(gpu_timing.seconds(call, flush=flush) * 1e6, 2)
    except (RuntimeError, NotImplementedError, ImportError, TypeError) as error:
        return f"no: {str(error).splitlines()[0]}"


def write_speed(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the table as CSV and Markdown."""
    write_csv(rows, list(rows[0]), output)
    about = rows[0]
    lines = [
        [
            f"`{row['kernel']}`",
            row["specimen"],
            f"{row['bound_us']:.1f}",
            *(f"{row[f'{name}_us']:.1f}" if isinstance(row[f"{name}_us"], float) else "–" for name in FORMS),
            f"{row['bound_us'] / row['triton_us']:.0%}" if isinstance(row["triton_us"], float) else "–",
        ]
        for row in rows
    ]
    head = ["kernel", "call", "bound", "Triton", "PyTorch", "compiled", "library", "of the bound"]
    text = f"""# Speed of kernels

Made by `python benchmarks/kernel_speed.py` on {about["gpu"]} with torch {about["torch"]}, Triton {about["triton"]},
commit {about["commit"]}; figures in `kernels.csv`.

Microseconds, median of 30 calls, each a CUDA graph of one call in bfloat16 with a cold L2 cache. *Bound*: time to move
the bytes at the speed of a copy ({about["copy_GB_per_s"]:,} GB/s in this run) or to compute the products at that of a
large one ({about["product_TFLOP_per_s"]:,} TFLOP/s), whichever is longer. *Of the bound*: fraction that Triton reaches.
*Library*: PyTorch's paged attention and grouped products. *PyTorch*: the kernel's reference; that of `slot_advance`
syncs with the device and is not a graph. Below ten microseconds most of the time is the launch.

{markdown_table(head, lines)}
"""
    output.with_suffix(".md").write_text(text, encoding="utf-8")


def write_csv(rows: list[dict[str, Any]], columns: list[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def commit() -> str:
    """Name of the commit, marked if the tree differs from it; empty outside of Git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the tables")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--compile-only", action="store_true", help="compile only, time nothing")
    parts.add_argument("--time-only", action="store_true", help="time only, compile nothing ahead of time")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("Triton is not installed, so nothing can be compiled. Run: pip install triton")
    if not options.time_only:
        write_aot(compile_all(), options.output / "kernels_aot.csv")
    if options.compile_only:
        return
    if not torch.cuda.is_available():
        print("No GPU found: kernels were not timed.")
        return
    rows = []
    for row in time_all():  # written row by row, to keep the rows of an interrupted run
        rows.append(row)
        write_speed(rows, options.output / "kernels.csv")


if __name__ == "__main__":
    main()
