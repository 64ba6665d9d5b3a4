"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from recursify.server.engine_process import EngineSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of the histograms."""


HELP = {
    "generated_tokens": "New tokens.",
    "prompt_tokens": "Tokens of prompts that were computed.",
    "cached_prompt_tokens": "Tokens of prompts whose keys and values were there already.",
    "recursions": "Recursions that new tokens ran, counted from 1.",
    "block_calls": "Calls of the shared block.",
    "preemptions": "Answers that had to begin again.",
    "engine_seconds": "Time in the engine's iterations.",
}


class Metrics:
    """All of a server's counts; those of engines that have stopped are kept."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = CounterMetric(
            "recursify_requests", "Requests by outcome.", ["endpoint", "outcome"], registry=self.registry
        )
        self.first_token = Histogram(
            "recursify_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "recursify_request_seconds", "From a request's arrival to its end.", buckets=SECONDS, registry=self.registry
        )
        self._snapshot = EngineSnapshot()
        self._ready = False
        self._kept_exits: Counter[int] = Counter()
        self._kept_totals: Counter[str] = Counter()
        self.registry.register(self)

    def keep(self, last: EngineSnapshot) -> None:
        """Add the counts of an engine that has stopped, as they were last seen, to those of the next."""
        self._kept_exits.update(last.exits)
        self._kept_totals.update(last.totals)
        self._snapshot = EngineSnapshot()

    def text(self, snapshot: EngineSnapshot | None, *, ready: bool) -> bytes:
        """Everything, with the engine as it is, or as it was last seen."""
        self._snapshot, self._ready = snapshot or self._snapshot, ready
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's part."""
        now = self._snapshot
        yield GaugeMetricFamily("recursify_up", "Whether requests are answered.", float(self._ready))
        yield GaugeMetricFamily("recursify_waiting_requests", "Answers that have not begun.", now.waiting)
        yield GaugeMetricFamily("recursify_running_requests", "Answers under way.", now.running)
        yield GaugeMetricFamily("recursify_pages", "Pages of keys and values.", now.pages)
        yield GaugeMetricFamily("recursify_pages_used", "Pages that are in use.", now.pages_used)
        rows = GaugeMetricFamily("recursify_rows", "Answers that are at a depth now.", labels=["depth"])
        for depth, count in sorted(now.rows.items()):
            rows.add_metric([str(depth)], count)
        yield rows
        exits = CounterMetricFamily("recursify_exits", "New tokens by the depth they were read at.", labels=["depth"])
        for depth, count in sorted((self._kept_exits + Counter(now.exits)).items()):
            exits.add_metric([str(depth)], count)
        yield exits
        for name, text in HELP.items():
            yield CounterMetricFamily(f"recursify_{name}", text, self._kept_totals[name] + now.totals.get(name, 0))
