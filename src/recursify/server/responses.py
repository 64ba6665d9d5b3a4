"""Parts that responses of both endpoints share: the response object, usage, and the content of an event."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recursify.engine import RequestOutput
from recursify.server.engine_process import OutputChunk

Logprobs = dict[int, float]
"""Mapping from token ids to log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class CompletionDelta:
    """New output of one completion, sent as one event.

    Attributes:
        index: Index of the completion.
        text: New text.
        token_ids: New tokens.
        depths: Exit depth of each new token.
        pieces: Text of each new token.
        logprobs: Log-probabilities per new token, if requested.
        finish_reason: Reason for the end of the completion, in its last event.
    """

    index: int
    text: str
    token_ids: list[int]
    depths: list[int]
    pieces: list[str]
    logprobs: list[Logprobs] | None
    finish_reason: str | None

    @property
    def extension(self) -> dict[str, Any]:
        """Fields outside OpenAI's format; pieces only if there are several."""
        return {"depths": self.depths} | ({"pieces": self.pieces} if len(self.pieces) > 1 else {})


class ResponseFormat(ABC):
    """Format of one response.

    Args:
        model: Name of the model for clients.
        tokenizer: Tokenizer of the model.
        kind: OpenAI's name of the response object.
        prefix: Prefix of the response's id.
    """

    def __init__(self, model: str, tokenizer: Any, kind: str, prefix: str) -> None:
        self.tokenizer = tokenizer
        self._header = {
            "id": f"{prefix}-{uuid.uuid4().hex[:24]}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def finished_choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Format a finished completion as a choice."""

    @abstractmethod
    def event_choice(self, delta: CompletionDelta) -> dict[str, Any]:
        """Format new output as the choice of an event."""

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Return the choices of the events that open a stream of ``count`` completions; by default none."""
        return []

    def with_choices(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Wrap ``choices`` in a response object."""
        return self._header | {"choices": choices, "usage": usage}


def merge_chunks(chunks: Sequence[tuple[int, OutputChunk]]) -> list[CompletionDelta]:
    """Merge chunks, each with the index of its completion, into one delta per completion."""
    by_index: dict[int, list[OutputChunk]] = {}
    for index, chunk in chunks:
        by_index.setdefault(index, []).append(chunk)
    return [_merge(index, chunks) for index, chunks in by_index.items()]


def _merge(index: int, chunks: Sequence[OutputChunk]) -> CompletionDelta:
    pieces: list[str] = []
    for chunk in chunks:
        # A chunk usually has one token; if it has more, the last one completed the text.
        pieces += [*[""] * (len(chunk.token_ids) - 1), chunk.text][: len(chunk.token_ids)]
    logprobs = [row for chunk in chunks for row in chunk.logprobs or ()]
    return CompletionDelta(
        index,
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.token_ids],
        [depth for chunk in chunks for depth in chunk.depths],
        pieces,
        None if chunks[0].logprobs is None else logprobs,
        chunks[-1].finish_reason,
    )


def usage_of(outputs: Sequence[RequestOutput], num_choices: int, num_recursions: int) -> dict[str, Any]:
    """Count tokens and their mean exit depth; the ``num_choices`` completions of a prompt count it once."""
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
