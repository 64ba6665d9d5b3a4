"""Response format of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recursify.engine import RequestOutput

from .logprobs import chat_logprobs
from .responses import CompletionDelta, ResponseFormat


class ChatFormat(ResponseFormat):
    """Format of one response.

    Args:
        model: Name of the model for clients.
        tokenizer: Tokenizer of the model.
        top_logprobs: Number of likeliest tokens per position, if log-probabilities are requested.
        stream: True for a streamed response.
    """

    def __init__(self, model: str, tokenizer: Any, top_logprobs: int, *, stream: bool) -> None:
        super().__init__(model, tokenizer, "chat.completion.chunk" if stream else "chat.completion", "chatcmpl")
        self.top_logprobs = top_logprobs

    def finished_choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Format a finished completion as a choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.token_ids, output.logprobs),
            "finish_reason": output.finish_reason,
            "recursify": {"depths": output.depths},
        }

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Return one choice per completion, with the role of the speaker."""
        choice: dict[str, Any] = {
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "recursify": {"depths": []},
        }
        return [choice | {"index": index} for index in range(count)]

    def event_choice(self, delta: CompletionDelta) -> dict[str, Any]:
        """Format new output as the choice of an event."""
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.token_ids or delta.text else {},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
            "finish_reason": delta.finish_reason,
            "recursify": delta.extension,
        }

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[dict[int, float]] | None) -> dict[str, Any] | None:
        return None if logprobs is None else chat_logprobs(self.tokenizer, tokens, logprobs, self.top_logprobs)
