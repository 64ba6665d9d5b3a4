"""GPU timing of captured graphs with a cold L2 cache, and the bandwidth and matrix rates to compare with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
"""Number of bytes that exceeds any L2 cache: a call then reads from memory, as it does between two layers."""


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture ``call`` in a CUDA graph, so that a launch costs as much as in the engine."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Callable[[], Any], *, flush: torch.Tensor, rounds: int = 30) -> float:
    """Median duration of one call on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def make_flush() -> torch.Tensor:
    """Buffer that :func:`seconds` overwrites between calls to flush the cache."""
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def copy_bandwidth(flush: torch.Tensor) -> float:
    """Bytes that a copy of 1 GiB reads and writes per second."""
    source = torch.ones(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), flush=flush)


def product_rate(flush: torch.Tensor, size: int = 8192) -> float:
    """Floating-point operations per second of a large bfloat16 product."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, flush=flush)
