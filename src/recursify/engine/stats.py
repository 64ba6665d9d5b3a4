"""Counters and timings of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Work of an engine since it was created, or since :meth:`Engine.reset_stats`."""

    iterations: int = 0
    """Number of iterations, host and device ones together."""
    block_calls: int = 0
    """Number of calls of the shared block."""
    block_rows: int = 0
    """Number of rows in those calls, including prompt tokens and tokens that catch up."""
    slot_calls: int = 0
    """Number of requests with a row in a call, summed over calls."""
    slots: int = 0
    """Number of requests that could have had one: ``max_num_seqs`` times the calls."""
    new_tokens: int = 0
    """Number of generated tokens."""
    depth_sum: int = 0
    """Number of recursions that generated tokens ran, summed over tokens."""
    exit_histogram: dict[int, int] = field(default_factory=dict)
    """Number of generated tokens by the depth after which they exited."""
    prompt_tokens: int = 0
    """Number of prompt tokens that were computed, counting those computed again after a preemption."""
    cached_tokens: int = 0
    """Number of prompt tokens whose keys and values were taken from the prefix cache."""
    preemptions: int = 0
    """Number of preemptions."""
    fetches: int = 0
    """Number of device-to-host copies, each of which synchronizes with the device."""
    seconds: float = 0.0
    """Time in :meth:`Engine.step` by the engine's clock; the next five are contained in it."""
    enter_seconds: float = 0.0
    """Time in embedding and prelude."""
    block_seconds: float = 0.0
    """Time in the shared block."""
    test_seconds: float = 0.0
    """Time between recursions: exit tests, routers, KV-cache writes for skipped depths."""
    exit_seconds: float = 0.0
    """Time in coda, LM head and sampling."""
    loop_seconds: float = 0.0
    """Time in the device loop, including the copy of its tokens to the host."""
    loop_iterations: int = 0
    """Number of ``iterations`` that ran in the device loop."""
    loop_waits: int = 0
    """Number of rows of the device loop that waited for an iteration with room for them."""
    graph_replays: int = 0
    """Number of CUDA graphs replayed, up to three per iteration."""
    implementation: str = "reference"
    """Implementation of the kernels: ``triton``, or ``reference`` for PyTorch."""
    kv_bytes: int = 0
    """Peak number of bytes of KV-cache pages in use."""

    def count_token(self, depth: int) -> None:
        """Count a token that was generated after ``depth``."""
        self.new_tokens += 1
        self.depth_sum += depth + 1
        self.exit_histogram[depth] = self.exit_histogram.get(depth, 0) + 1

    @property
    def mean_recursions(self) -> float:
        """Mean number of recursions per generated token."""
        return self.depth_sum / max(self.new_tokens, 1)

    @property
    def occupancy(self) -> float:
        """Fraction of the slots that had rows in calls of the block."""
        return self.slot_calls / max(self.slots, 1)
