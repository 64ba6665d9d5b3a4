"""Time and memory of whole processes, and of the stages of a conversion in one.

Only the standard library is imported here, so that a benchmark that measures others stays small itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SAMPLING_SECONDS = 0.05

CONVERT = """
import json, sys, time
from pathlib import Path
model, output, settings, report = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
import torch, recursify
torch.set_num_threads(int(sys.argv[5]))

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

last, stages = [time.process_time(), time.perf_counter()], {}

def progress(stage, done, total):
    now = [time.process_time(), time.perf_counter()]
    figures = stages.setdefault(stage, {"cpu_seconds": 0.0, "wall_seconds": 0.0, "peak_bytes": 0})
    figures["cpu_seconds"] += now[0] - last[0]
    figures["wall_seconds"] += now[1] - last[1]
    figures["peak_bytes"] = max(figures["peak_bytes"], peak())
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    last[:] = now
    report.write_text(json.dumps(stages))

try:
    from recursify.convert.check import make_conversion  # before there was recursify.convert_model
except ImportError:
    recursify.convert_model(model, output, check=False, overwrite=True, progress=progress, **settings)
else:
    make_conversion(model, settings).write(Path(output), overwrite=True, progress=progress)
progress("write", 1, 1)
"""
"""Program of :func:`convert`: the time since the call of ``progress`` before belongs to the stage that is reported."""


@dataclass(frozen=True)
class Cost:
    """Cost of one process.

    Attributes:
        wall_seconds: Time until it ended.
        cpu_seconds: User and system time, of its children as well.
        peak_bytes: Peak resident memory.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command to its end and measure it.

    Args:
        command: Program and arguments.
        environment: Variables to add to this process's.

    Raises:
        RuntimeError: It failed; with the end of its output.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        peak = _watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # it was reaped here, for its own usage
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak)


def _watch(pid: int) -> int:
    """Peak resident bytes of a process, sampled until it ends: the peak may be begun anew meanwhile.

    ``ru_maxrss`` is not used, since a child inherits its parent's.
    """
    peak, status = 0, Path(f"/proc/{pid}/status")
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(SAMPLING_SECONDS)
    return peak


def convert(
    model: str | Path, output: Path, settings: dict[str, Any], *, threads: int, source: Path
) -> tuple[Cost, dict[str, dict[str, float]]]:
    """Convert a model in a process of its own.

    Args:
        model: Dense model.
        output: Folder to write.
        settings: Fields of ``ConversionSettings``.
        threads: Threads of torch and of its libraries.
        source: Checkout whose ``src`` is imported.

    Returns:
        Cost of the process, and ``cpu_seconds``, ``wall_seconds`` and ``peak_bytes`` by stage.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "stages.json"
        arguments = [str(model), str(output), json.dumps(settings), str(report), str(threads)]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**dict.fromkeys(names, str(threads)), "PYTHONPATH": str(source / "src")}
        cost = run([sys.executable, "-c", CONVERT, *arguments], environment)
        stages = json.loads(report.read_text())
    peak = max([cost.peak_bytes, *(stage["peak_bytes"] for stage in stages.values())])  # samples miss short peaks
    return replace(cost, peak_bytes=peak), stages


def peak_bytes() -> int:
    """Peak resident bytes of this process since :func:`reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_peak() -> None:
    """Begin the peak of this process anew."""
    Path("/proc/self/clear_refs").write_text("5")
