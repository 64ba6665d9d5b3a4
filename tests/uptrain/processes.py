"""Uptraining runs in processes of their own, forked from one that has imported everything, so that many are cheap."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["recursify.uptrain.uptraining", "trl"])


def start_run(log: Path, *arguments: Any, rank: int = 0, world_size: int = 1, port: int = 0, **options: Any):
    """Start ``uptrain(*arguments, **options)`` in a process; what it raises is written to ``log``."""
    environment = {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    process = _context.Process(target=_run, args=(log, environment, arguments, options), daemon=True)
    process.start()
    return process


def run(log: Path, *arguments: Any, world_size: int = 1, **options: Any) -> None:
    """Run to the end in ``world_size`` processes; fails with what the first of them raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [log.with_suffix(f".{rank}") for rank in range(world_size)]
    processes = [
        start_run(log, *arguments, rank=rank, world_size=world_size, port=port, **options)
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.join(180)
    failures = [log.read_text() for log in logs if log.exists()]
    assert not failures, failures[0]
    assert [process.exitcode for process in processes] == [0] * world_size


def _run(log: Path, environment: dict[str, str], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    from recursify.uptrain.uptraining import uptrain

    try:
        uptrain(*arguments, progress=lambda *_: None, **options)
    except BaseException:
        log.write_text(traceback.format_exc())
        sys.exit(1)
