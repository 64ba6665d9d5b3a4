"""Parts that responses of both endpoints share: the response object, its choices, and usage."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from recursify.engine import RequestOutput
from recursify.server.engine_process import OutputChunk

Logprobs = dict[int, float]
"""Mapping from token ids to log-probabilities, the likeliest first."""


class ResponseFormat(ABC):
    """Format of one response; ``kind`` is OpenAI's name of the object, and ``prefix`` begins its id."""

    def __init__(self, model: str, tokenizer: Any, kind: str, prefix: str) -> None:
        self.tokenizer = tokenizer
        response_id = f"{prefix}-{uuid.uuid4().hex[:24]}"
        self._header = {"id": response_id, "object": kind, "created": int(time.time()), "model": model}

    @abstractmethod
    def finished_content(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Format the text and the log-probabilities of a finished completion."""

    @abstractmethod
    def new_content(self, index: int, chunk: OutputChunk) -> dict[str, Any]:
        """Format the text and the log-probabilities of new output."""

    def finished_choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Format a finished completion as a choice."""
        content = self.finished_content(index, output)
        return choice(index, content, output.finish_reason, depths=output.depths)

    def event_choice(self, index: int, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """Format the new output of a completion as the choice of an event, with the text of each of several tokens."""
        chunk = merge_chunks(chunks)
        extension: dict[str, Any] = {"depths": chunk.depths}
        if len(chunk.token_ids) > 1:
            extension["pieces"] = [piece for part in chunks for piece in _pieces(part)]
        return choice(index, self.new_content(index, chunk), chunk.finish_reason, **extension)

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Return the choices of the events that open a stream of ``count`` completions; by default none."""
        return []

    def with_choices(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Wrap ``choices`` in a response object."""
        return self._header | {"choices": choices, "usage": usage}


def choice(index: int, content: dict[str, Any], finish_reason: str | None, **extension: Any) -> dict[str, Any]:
    """Make a choice; ``extension`` has the fields outside OpenAI's format."""
    return {"index": index, **content, "finish_reason": finish_reason, "recursify": extension}


def merge_chunks(chunks: Sequence[OutputChunk]) -> OutputChunk:
    """Merge consecutive chunks of one completion."""
    last = chunks[-1]
    return OutputChunk(
        [token for chunk in chunks for token in chunk.token_ids],
        "".join(chunk.text for chunk in chunks),
        [depth for chunk in chunks for depth in chunk.depths],
        None if last.logprobs is None else [row for chunk in chunks for row in chunk.logprobs or ()],
        last.finish_reason,
        last.output,
    )


def _pieces(chunk: OutputChunk) -> list[str]:
    """Return the text of each token; of several in a chunk, the last one completed the text."""
    return [*[""] * (len(chunk.token_ids) - 1), chunk.text][: len(chunk.token_ids)]


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
