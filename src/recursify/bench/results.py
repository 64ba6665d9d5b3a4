"""Results of a benchmark: rows, tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recursify.engine import EngineStats
from recursify.pictures import DARK, SHARED, new_figure, save_figure

from .contestants import BenchRun, Contestant
from .ideal import PHASES, Gain
from .workload import Workload

COUNTS = ("new_tokens", "block_calls", "block_rows", "loop_iterations", "graph_replays", "kv_bytes")
STATS = (*COUNTS, *PHASES, "loop_seconds", "mean_recursions", "occupancy", "implementation")
"""Statistics of the engine that are reported."""

FIGURES = ("tokens/s", "× generate", "recursions", "occupancy", "KV MiB")
IDEALS = ("G", "G*", "G* per call", "η")


@dataclass(frozen=True)
class BenchmarkRow:
    """Measurements of one contestant at one concurrency; those of a run are of the median run.

    Attributes:
        contestant: Name of the contestant.
        concurrency: Maximum number of requests that run at once.
        tokens_per_second: New tokens per second.
        slowest: Tokens per second of the slowest round.
        fastest: Tokens per second of the fastest round.
        median_latency: Median seconds to the end of a request.
        longest_latency: Maximum seconds to the end of a request.
        median_first_token: Median seconds to the first token; None if it is not measured.
        is_simulation: True if the contestant uses knowledge that a real run does not have.
        stats: Statistics of the engine; None for other contestants.
        ratio: Tokens per second relative to ``generate``; None if it was not compared.
        gain: Gain of early exit; None without early exit.
    """

    contestant: str
    concurrency: int
    tokens_per_second: float
    slowest: float
    fastest: float
    median_latency: float
    longest_latency: float
    median_first_token: float | None
    is_simulation: bool
    stats: EngineStats | None
    ratio: float | None = None
    gain: Gain | None = None

    @classmethod
    def of(cls, contestant: Contestant, workload: Workload, runs: Sequence[BenchRun]) -> BenchmarkRow:
        """Summarize the runs of a contestant."""
        runs = sorted(runs, key=lambda run: run.seconds)
        fastest, median, slowest = runs[0], runs[len(runs) // 2], runs[-1]
        return cls(
            contestant.name,
            workload.concurrency,
            tokens_per_second=workload.total / median.seconds,
            slowest=workload.total / slowest.seconds,
            fastest=workload.total / fastest.seconds,
            median_latency=statistics.median(median.latencies),
            longest_latency=max(median.latencies),
            median_first_token=statistics.median(median.first_tokens) if median.first_tokens else None,
            is_simulation=contestant.is_simulation,
            stats=median.stats,
        )

    @property
    def label(self) -> str:
        """Name of the contestant in tables, which marks a simulation."""
        return self.contestant + (" (simulation)" if self.is_simulation else "")

    @property
    def figures(self) -> list[str]:
        """Cells of the columns :data:`FIGURES`; those of the engine are empty for other contestants."""
        cells = [""] * 3
        if (stats := self.stats) is not None:
            cells = [f"{stats.mean_recursions:.2f}", f"{stats.occupancy:.0%}", f"{stats.kv_bytes / 2**20:.1f}"]
        return [f"{self.tokens_per_second:.1f}", "" if self.ratio is None else f"{self.ratio:.2f}", *cells]

    @property
    def ideals(self) -> list[str]:
        """Cells of the columns :data:`IDEALS`, empty without early exit."""
        if (gain := self.gain) is None:
            return [""] * len(IDEALS)
        return [f"{value:.2f}" for value in (gain.gain, gain.ideal_gain, gain.ideal_gain_per_call, gain.efficiency)]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, without figures that were not measured."""
        measured = {name: value for name, value in vars(self).items() if value is not None}
        stats, gain = measured.pop("stats", None), measured.pop("gain", None)
        row = {"row": measured.pop("contestant"), **measured}
        if stats is not None:
            row |= {name: getattr(stats, name) for name in STATS}
            row |= {"recursions": stats.depth_sum, "fetches_per_iteration": stats.fetches / max(stats.iterations, 1)}
        return row if gain is None else row | gain.to_dict()


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of :func:`~recursify.bench.plan.benchmark_model`.

    Attributes:
        rows: Measurements per contestant and concurrency.
        device: Name of the device.
        dtype: Data type of the weights.
        threads: Number of CPU threads.
        clock: Kind of time that was measured: ``CPU time`` or ``wall time``.
        rounds: Number of measured rounds.
        requests: Number of requests per concurrency.
        new_tokens: Number of new tokens per concurrency.
        even: True if all prompts and completions had the same length.
        forced: Fractions of tokens that were forced to exit after each recursion.
        kv: Source of the keys and values that forced exits skipped.
        versions: Mapping from package names to versions.
    """

    rows: tuple[BenchmarkRow, ...]
    device: str
    dtype: str
    threads: int
    clock: str
    rounds: int
    requests: tuple[int, ...]
    new_tokens: tuple[int, ...]
    even: bool
    forced: tuple[float, ...]
    kv: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, as ``recursify bench --json`` prints it."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return data | {"rows": [row.to_dict() for row in self.rows]}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table, as ``recursify bench`` prints it."""
        rows = [[row.label, str(row.concurrency), *row.figures, *row.ideals] for row in self.rows]
        return ["", "concurrency", *FIGURES, *IDEALS], rows


def plot_speeds(result: BenchmarkResult, file: Path) -> None:
    """Plot tokens per second of every contestant and concurrency.

    Raises:
        SettingsError: matplotlib is not installed, or ``file`` is not the name of an image.
        OutputError: The file cannot be written.
    """
    names = list(dict.fromkeys(row.contestant for row in result.rows))
    sizes = list(dict.fromkeys(row.concurrency for row in result.rows))
    figure = new_figure(8, 1 + 0.35 * len(names) * len(sizes))
    axes = figure.subplots(len(sizes), 1, squeeze=False)[:, 0]
    for axis, size in zip(axes, sizes, strict=True):
        speeds = {row.contestant: row.tokens_per_second for row in result.rows if row.concurrency == size}
        colours = [SHARED if name.startswith("engine") else DARK for name in names]
        axis.barh(names, [speeds[name] for name in names], color=colours)
        axis.invert_yaxis()
        axis.set_title(f"concurrency {size}")
        axis.set_xlabel("tokens per second")
    save_figure(figure, file)
