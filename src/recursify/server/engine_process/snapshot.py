"""Counts of an engine, in a form that can be sent to another process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from recursify.engine.engine import Engine


@dataclass(frozen=True)
class EngineSnapshot:
    """State of an engine between two iterations, and its counts since the last :meth:`Engine.reset_stats`.

    Attributes:
        waiting: Number of requests that have not started.
        running: Number of requests that run.
        rows: Number of scheduled chunks per depth.
        pages: Total number of KV pages.
        pages_used: Number of KV pages in use.
        exits: Number of new tokens per exit depth.
        totals: Mapping from names to other counts.
    """

    waiting: int = 0
    running: int = 0
    rows: dict[int, int] = field(default_factory=dict)
    pages: int = 0
    pages_used: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine) -> EngineSnapshot:
        """Read the counts of ``engine``, in its own thread."""
        stats, scheduler = engine.stats, engine.scheduler
        return cls(
            len(scheduler.waiting),
            len(scheduler.running),
            dict(Counter(engine.depths)),
            sum(pool.num_pages for pool in engine.kv_cache.pools),
            sum(pool.num_used for pool in engine.kv_cache.pools),
            dict(stats.exit_histogram or {}),
            {
                "generated_tokens": stats.new_tokens,
                "prompt_tokens": stats.prompt_tokens,
                "cached_prompt_tokens": stats.cached_tokens,
                "recursions": stats.depth_sum,
                "block_calls": stats.block_calls,
                "preemptions": stats.preemptions,
                "engine_seconds": stats.seconds,
            },
        )
