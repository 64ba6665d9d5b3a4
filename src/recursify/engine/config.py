"""Settings of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from pydantic import Strict

from recursify.errors import EngineError
from recursify.settings import Settings

Positive = Annotated[int, Strict(), Ge(1)]
"""Whole number of at least 1."""


class EngineConfig(Settings, error=EngineError):
    """Limits and modes of an :class:`~recursify.engine.Engine`.

    Raises:
        EngineError: A setting is unknown, or its value is out of its range.
    """

    panels: ClassVar[Mapping[str, str]] = {"kv": "Engine"}

    kv: str | None = None
    """Source of the keys and values of depths that a token skips: deferred, copied or latest. Without it, the mode that
    the model was trained with."""
    force_kv: bool = False
    """Allow a KV mode that the model was not trained with."""
    max_num_seqs: Positive = 32
    """Maximum number of requests that run at once; the others wait in a queue."""
    page_size: Positive = 16
    """Tokens per page of the KV cache."""
    num_pages: Positive | None = None
    """Number of pages in the KV cache. Without it, as many as fit into its memory."""
    kv_cache_memory_bytes: Positive = 2**30
    """Memory of the KV cache in bytes, unless the number of pages is given."""
    max_num_batched_tokens: Positive = 2048
    """Upper bound on the prompt tokens scheduled per iteration; new tokens are scheduled in any case."""
    chunk_size: Positive = 512
    """Maximum number of prompt tokens that a request runs at once (chunked prefill)."""
    max_model_len: Positive | None = None
    """Maximum number of tokens of a request, prompt and output together; the model's context is the default, and the
    most."""
    enable_prefix_caching: bool = True
    """Reuse the KV-cache pages of a prompt prefix that was computed before, in whole pages. Routed models do not
    support it: their pages hold tokens that are not adjacent."""
    lockstep: bool = False
    """Schedule new tokens only when no token is in progress, so that each batch waits for its deepest row. A baseline
    for measurements."""
    async_output: bool | None = None
    """Copy sampled tokens to the host together with the next iteration's exit decisions: one sync per iteration instead
    of two, at the cost of a wasted token after EOS. Without it, enabled on devices other than CPUs."""
    implementation: Literal["auto", "reference", "triton"] = "auto"
    """Implementation of the kernels: triton, reference (PyTorch), or auto, which is Triton on GPUs with bfloat16."""
    device_loop: bool | None = None
    """Run new tokens in a loop on the device, without host decisions in between, as CUDA graphs on GPUs; turns
    asynchronous output off. Without it, enabled for supported models where the kernels are Triton's on a GPU."""
    num_device_steps: Positive = 8
    """Iterations of the device loop between two syncs with the host. More of them cost less and detect EOS later."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise EngineError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be more than max_num_seqs "
                f"({self.max_num_seqs}): with all requests running, no prompt could be scheduled. Increase it."
            )
