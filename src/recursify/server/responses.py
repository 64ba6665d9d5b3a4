"""What completions and chats have in common on their way out: ids, usage, and the tokens of one event."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recursify.engine import RequestOutput
from recursify.server.engine_process import OutputChunk

Logged = dict[int, float]
"""``{token id: log-probability}``."""


@dataclass(frozen=True)
class CompletionDelta:
    """What one event says of one answer.

    Attributes:
        index: The answer's.
        text: New text.
        token_ids: New tokens.
        depths: Per token, the recursion after which it was read.
        pieces: Per token, the text that came with it.
        logprobs: Per token, if asked for.
        finish_reason: In the answer's last event.
    """

    index: int
    text: str
    token_ids: list[int]
    depths: list[int]
    pieces: list[str]
    logprobs: list[Logged] | None
    finish_reason: str | None

    @property
    def extension(self) -> dict[str, Any]:
        """What OpenAI's format has no place for; the texts only where they are not the event's own."""
        return {"depths": self.depths} | ({"pieces": self.pieces} if len(self.pieces) > 1 else {})


class Format(Protocol):
    """How an endpoint writes its answers."""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]: ...

    def opening(self, count: int) -> list[dict[str, Any]]: ...

    def event(self, said: CompletionDelta) -> dict[str, Any]: ...

    def with_choices(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]: ...


def joined(chunks: Sequence[tuple[int, OutputChunk]]) -> list[CompletionDelta]:
    """Chunks that came together, as one event per answer."""
    by_index: dict[int, list[OutputChunk]] = {}
    for index, chunk in chunks:
        by_index.setdefault(index, []).append(chunk)
    return [_join(index, its) for index, its in by_index.items()]


def _join(index: int, chunks: Sequence[OutputChunk]) -> CompletionDelta:
    pieces: list[str] = []
    for chunk in chunks:
        # One token comes with a chunk; where there were more, the last one completed the text.
        pieces += [*[""] * (len(chunk.token_ids) - 1), chunk.text][: len(chunk.token_ids)]
    logged = [row for chunk in chunks for row in chunk.logprobs or ()]
    return CompletionDelta(
        index,
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.token_ids],
        [depth for chunk in chunks for depth in chunk.depths],
        pieces,
        None if chunks[0].logprobs is None else logged,
        chunks[-1].finish_reason,
    )


def new_id(prefix: str) -> str:
    """An answer's name."""
    return f"{prefix}-{uuid.uuid4().hex[:24]}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage_of(outputs: Sequence[RequestOutput], num_choices: int, num_recursions: int) -> dict[str, Any]:
    """Counts of tokens, and how deep the new ones went; a prompt counts once, however many answers it has."""
    prompt = sum(len(output.prompt_ids) for output in outputs[::num_choices])
    depths = [depth for output in outputs for depth in output.depths]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": len(depths),
        "total_tokens": prompt + len(depths),
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs[::num_choices])},
        "mean_depth": round(sum(depths) / len(depths), 4) if depths else None,
        "num_recursions": num_recursions,
    }
