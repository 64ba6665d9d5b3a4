"""Functions in processes that are forked from one with all imports done, so that starting many is cheap."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["recursify.uptrain.run", "trl"])


def uptrain(source: Path, output: Path, settings: Any, *, die_at_tokens: int | None = None, **options: Any) -> None:
    """Train with ``uptrain_model``; ``kill -9`` the process that reports progress at ``die_at_tokens`` tokens."""
    from recursify.uptrain.run import uptrain_model

    def progress(_: str, done: int, __: int) -> None:
        if done == die_at_tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    uptrain_model(source, output, settings=settings, progress=progress, **options)


def convert(source: Path, output: Path, *, die_at_write: int | None = None, **options: Any) -> None:
    """Convert with ``convert_model``; ``kill -9`` the process when it writes that tensor, counted from 1."""
    from recursify.checkpoint.writer import ShardedCheckpoint
    from recursify.convert.pipeline import convert_model

    write, written = ShardedCheckpoint._write, 0

    def count(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == die_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    ShardedCheckpoint._write = count
    convert_model(source, output, check=False, **options)


def start_run(
    log: Path,
    *arguments: Any,
    rank: int = 0,
    world_size: int = 1,
    port: int = 0,
    function: Callable[..., None] = uptrain,
    **options: Any,
):
    """Start ``function(*arguments, **options)`` in a process, which writes its exception to ``log``."""
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
    process = _context.Process(target=_run, args=(log, environment, function, arguments, options), daemon=True)
    process.start()
    return process


def start_all(log: Path, *arguments: Any, world_size: int, **options: Any) -> list[Any]:
    """Start the ranks of a process group, which write their exceptions to ``log.0``, ``log.1``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start_run(log.with_suffix(f".{rank}"), *arguments, rank=rank, world_size=world_size, port=port, **options)
        for rank in range(world_size)
    ]


def run(log: Path, *arguments: Any, world_size: int = 1, **options: Any) -> None:
    """Run in ``world_size`` processes to the end, and fail with the first exception."""
    logs = [log.with_suffix(f".{rank}") for rank in range(world_size)]
    for old in logs:
        old.unlink(missing_ok=True)
    processes = start_all(log, *arguments, world_size=world_size, **options)
    for process in processes:
        process.join(180)
    failures = [log.read_text() for log in logs if log.exists()]
    assert not failures, failures[0]
    assert [process.exitcode for process in processes] == [0] * world_size


def _run(
    log: Path,
    environment: dict[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments, **options)
    except BaseException:
        log.write_text(traceback.format_exc())
        sys.exit(1)
