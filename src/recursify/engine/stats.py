"""Counters and timings of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Work of an engine since it was created, or since :meth:`Engine.reset_stats`.

    Attributes:
        iterations: Number of iterations, host and device ones together.
        block_calls: Number of calls of the shared block.
        block_rows: Number of rows in those calls, including prompt tokens and tokens that catch up.
        slot_calls: Number of requests with a row in a call, summed over calls.
        slots: Number of requests that could have had one: ``max_num_seqs`` times the calls.
        new_tokens: Number of generated tokens.
        depth_sum: Number of recursions that generated tokens ran, summed over tokens.
        exit_histogram: Number of generated tokens by the depth after which they exited.
        prompt_tokens: Number of prompt tokens that were computed, counting those computed again after a preemption.
        cached_tokens: Number of prompt tokens whose keys and values were taken from the prefix cache.
        preemptions: Number of preemptions.
        fetches: Number of device-to-host copies, each of which synchronizes with the device.
        seconds: Time in :meth:`Engine.step` by the engine's clock; the next five are contained in it.
        enter_seconds: Time in embedding and prelude.
        block_seconds: Time in the shared block.
        test_seconds: Time between recursions: exit tests, routers, KV-cache writes for skipped depths.
        exit_seconds: Time in coda, LM head and sampling.
        loop_seconds: Time in the device loop, including the copy of its tokens to the host.
        loop_iterations: Number of ``iterations`` that ran in the device loop.
        loop_waits: Number of rows of the device loop that waited for an iteration with room for them.
        graph_replays: Number of CUDA graphs replayed, up to three per iteration.
        implementation: Implementation of the kernels: ``triton``, or ``reference`` for PyTorch.
        kv_bytes: Peak number of bytes of KV-cache pages in use.
    """

    iterations: int = 0
    block_calls: int = 0
    block_rows: int = 0
    slot_calls: int = 0
    slots: int = 0
    new_tokens: int = 0
    depth_sum: int = 0
    exit_histogram: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    fetches: int = 0
    seconds: float = 0.0
    enter_seconds: float = 0.0
    block_seconds: float = 0.0
    test_seconds: float = 0.0
    exit_seconds: float = 0.0
    loop_seconds: float = 0.0
    loop_iterations: int = 0
    loop_waits: int = 0
    graph_replays: int = 0
    implementation: str = "reference"
    kv_bytes: int = 0

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
