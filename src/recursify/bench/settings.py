"""Settings of a benchmark: the contestants, the requests, and the number of rounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a benchmark."""

    dense: str | Path | None = None
    """Dense model to measure as a control."""

    concurrency: tuple[int, ...] = (1, 8)
    """Numbers of concurrent requests; each is measured separately."""

    requests: int = 3
    """Total number of requests, as a multiple of the concurrency."""

    prompt: int = 32
    """Length of the longest prompt in tokens."""

    new: int = 32
    """Mean number of new tokens per request."""

    even: bool = False
    """Give all prompts, and all completions, the same length."""

    forced: tuple[float, ...] | None = None
    """Fractions of the tokens that are forced to exit after each recursion; by default equal fractions."""

    kv: str = "latest"
    """Source of the keys and values of depths that forced exits skip: latest, copied or deferred."""

    exit_policy: str | None = None
    """Exit policy to measure in addition to forced exits."""

    threshold: float | None = None
    """Confidence above which the policy exits; by default the calibrated threshold, else the policy's."""

    oracle: bool = False
    """Measure exits at the earliest correct depth as well, known from an earlier run: a simulation."""

    compiled: bool = False
    """Measure ``generate`` with a static cache and a compiled forward pass as well."""

    rounds: int = 3
    """Number of measured rounds; the median counts."""

    threads: int | None = None
    """Number of CPU threads; with 1, CPU time is measured instead of wall time."""

    plot: Path | None = None
    """Image file for tokens per second (.png or .svg)."""
