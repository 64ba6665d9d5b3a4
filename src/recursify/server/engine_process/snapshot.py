"""An engine's counts, as they can be sent elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recursify.engine.engine import Engine


@dataclass(frozen=True)
class EngineSnapshot:
    """An engine between two iterations; counts since it was made, or :meth:`Engine.reset_stats`.

    Attributes:
        waiting: Answers that have not begun.
        running: Answers under way.
        rows: By depth, tokens and prompts that are there now.
        pages: Of keys and values, in all.
        pages_used: Of them.
        exits: By depth, new tokens that were read after it.
        totals: Other counts, by name.
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
        """To be called where the engine runs."""
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
