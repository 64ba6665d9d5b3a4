"""How near kernels come to what the machine can do, and what they take of a GPU that is not there.

    python benchmarks/kernel_speed.py

Where Triton is installed, every kernel is compiled ahead of time for compute capabilities 8.0 and 9.0, for the calls of
``kernel_specimens.py``, without a GPU: ``results/kernels_aot.*``. Tests hold the spills to that table.

(It is not called ``kernels.py``: on the path of the benchmarks that would stand in for Hugging Face's package.)
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from typing import Any

import torch

from kernel_specimens import SPECIMENS
from keyed_results import markdown_table

RESULTS = Path(__file__).parent / "results"
CAPABILITIES = (80, 90)
AOT_COLUMNS = (
    *("kernel", "specimen", "launched", "capability", "grid", "warps"),
    *("registers", "shared_bytes", "spill_bytes", "tensor_core_ops", "triton"),
)


def compile_all() -> list[dict[str, Any]]:
    """A row per specimen, launch and capability."""
    import triton

    from recursify.kernels.ahead_of_time import compiled, recorded

    rows = []
    for specimen in SPECIMENS:
        with recorded() as launches:
            specimen.build(torch.device("meta"))("triton")
        for launch in launches:
            for capability in CAPABILITIES:
                found = compiled(launch, capability)
                rows.append(
                    {
                        "specimen": specimen.case,
                        "kernel": specimen.kernel,
                        "launched": found.kernel,
                        "capability": capability,
                        "grid": "×".join(map(str, launch.grid)),
                        "warps": found.num_warps,
                        "registers": found.registers,
                        "shared_bytes": found.shared_bytes,
                        "spill_bytes": found.spill_bytes,
                        "tensor_core_ops": found.tensor_core_ops,
                        "triton": triton.__version__,
                    }
                )
    return rows


def write_aot(rows: list[dict[str, Any]], output: Path) -> None:
    """The table as CSV, and for reading beside it."""
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

Each launch of `benchmarks/kernel_specimens.py`, in bfloat16, compiled for NVIDIA's compute capabilities 8.0 (A100) and
9.0 (H100) as its first call there would compile it. *Registers* and *spilled bytes* are per thread, *shared bytes* per
program; *mma* counts matrix instructions in the code. It says that the kernels compile, fit, and use tensor cores. It
says nothing of speed: they have not run on a GPU yet.

{markdown_table(head, lines)}
"""
    output.with_suffix(".md").write_text(text, encoding="utf-8")


def write_csv(rows: list[dict[str, Any]], columns: list[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--compile-only", action="store_true", help="time nothing")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("Triton is not installed: there is nothing to compile. Run: pip install triton")
    write_aot(compile_all(), options.output / "kernels_aot.csv")


if __name__ == "__main__":
    main()
