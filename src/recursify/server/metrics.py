"""Metrics of the server and its engine, in Prometheus' format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from recursify.server.engine_process import EngineSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histogram buckets."""

HELP = {
    "generated_tokens": "New tokens.",
    "prompt_tokens": "Prompt tokens that were computed.",
    "cached_prompt_tokens": "Prompt tokens whose keys and values were cached.",
    "recursions": "Recursions that new tokens ran.",
    "block_calls": "Calls of the shared block.",
    "preemptions": "Requests that were preempted and started again.",
    "engine_seconds": "Time spent in the engine's iterations.",
}


class Metrics:
    """Metrics of a server; counts of stopped engines are kept."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = partial(Histogram, buckets=SECONDS, registry=self.registry)
        since = "Time from the arrival of a request to its"
        self.first_token = make("recursify_time_to_first_token_seconds", f"{since} first token.")
        self.duration = make("recursify_request_seconds", f"{since} end.")
        labels = ["endpoint", "outcome"]
        self.requests = CounterMetric("recursify_requests", "Requests by outcome.", labels, registry=self.registry)
        self._snapshot, self._ready = EngineSnapshot(), False
        self._stopped_exits: Counter[int] = Counter()
        self._stopped_totals: Counter[str] = Counter()
        self.registry.register(self)

    def keep(self, last: EngineSnapshot) -> None:
        """Add the last counts of an engine that has stopped to those of the next engine."""
        self._stopped_exits.update(last.exits)
        self._stopped_totals.update(last.totals)
        self._snapshot = EngineSnapshot()

    def text(self, snapshot: EngineSnapshot | None, *, ready: bool) -> bytes:
        """Format all metrics, with the engine's current counts or, without a snapshot, the most recent ones."""
        self._snapshot, self._ready = snapshot or self._snapshot, ready
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the engine; called by the registry."""
        now = self._snapshot
        yield GaugeMetricFamily("recursify_up", "1 if the server takes requests, else 0.", float(self._ready))
        yield GaugeMetricFamily("recursify_waiting_requests", "Completions that wait for the engine.", now.waiting)
        yield GaugeMetricFamily("recursify_running_requests", "Completions that run.", now.running)
        yield GaugeMetricFamily("recursify_pages", "KV pages.", now.pages)
        yield GaugeMetricFamily("recursify_pages_used", "KV pages in use.", now.pages_used)
        rows = GaugeMetricFamily("recursify_rows", "Scheduled chunks per depth.", labels=["depth"])
        exits = CounterMetricFamily("recursify_exits", "New tokens per exit depth.", labels=["depth"])
        for family, counts in ((rows, now.rows), (exits, self._stopped_exits + Counter(now.exits))):
            for depth, count in sorted(counts.items()):
                family.add_metric([str(depth)], count)
            yield family
        for name, text in HELP.items():
            yield CounterMetricFamily(f"recursify_{name}", text, self._stopped_totals[name] + now.totals.get(name, 0))
