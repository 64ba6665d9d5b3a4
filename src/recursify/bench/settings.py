"""Settings of a benchmark: the contestants, the requests, and the number of rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from pydantic import PositiveInt

from recursify.settings import Fractions, Option, Settings


class BenchSettings(Settings):
    """Settings of a benchmark."""

    dense: str | None = None
    """Dense model to measure as a control."""
    concurrency: tuple[PositiveInt, ...] = (1, 8)
    """Numbers of concurrent requests; each is measured separately."""
    requests: PositiveInt = 3
    """Total number of requests, as a multiple of the concurrency."""
    prompt: Annotated[int, Ge(2)] = 32
    """Length of the longest prompt in tokens."""
    new: Annotated[int, Ge(2)] = 32
    """Mean number of new tokens per request."""
    even: bool = False
    """Give all prompts, and all completions, the same length."""
    forced: Fractions | None = None
    """Fractions of the tokens that are forced to exit after each recursion; by default equal fractions."""
    kv: str = "latest"
    """Source of the keys and values of depths that forced exits skip: latest, copied or deferred."""
    exit_policy: Annotated[str | None, Option("--exit")] = None
    """Exit policy to measure in addition to forced exits."""
    threshold: float | None = None
    """Confidence above which the policy exits; by default the calibrated threshold, else the policy's."""
    oracle: bool = False
    """Measure exits at the earliest correct depth, too, known from an earlier run: a simulation."""
    compiled: bool = False
    """Measure ``generate`` with a static cache and a compiled forward pass, too."""
    rounds: PositiveInt = 3
    """Number of measured rounds; the median counts."""
    threads: PositiveInt | None = None
    """Number of CPU threads; with 1, CPU time is measured instead of wall time."""
    plot: Path | None = None
    """Image file for a plot of tokens per second (.png or .svg)."""
