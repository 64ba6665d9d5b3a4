"""Response format of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recursify.engine import RequestOutput

from .logprobs import chat_logprobs
from .responses import CompletionDelta, new_id, now


class ChatFormat:
    """Format of one response.

    Args:
        model: Name of the model for clients.
        tokenizer: Tokenizer of the model.
        top_logprobs: Number of likeliest tokens per position, if log-probabilities are requested.
        stream: True for a streamed response.
    """

    def __init__(self, model: str, tokenizer: Any, top_logprobs: int, *, stream: bool) -> None:
        self.model, self.tokenizer, self.top_logprobs = model, tokenizer, top_logprobs
        self._object = "chat.completion.chunk" if stream else "chat.completion"
        self._id, self._created = new_id("chatcmpl"), now()

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Format finished completions as one response, without the usage."""
        return self.with_choices(
            [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": output.text, "refusal": None},
                    "logprobs": self._logprobs(output.token_ids, output.logprobs),
                    "finish_reason": output.finish_reason,
                    "recursify": {"depths": output.depths},
                }
                for index, output in enumerate(outputs)
            ]
        )

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Return one choice per completion, with the role of the speaker."""
        delta = {"role": "assistant", "content": ""}
        return [self._event_choice(index, delta, None, None, {"depths": []}) for index in range(count)]

    def choice(self, delta: CompletionDelta) -> dict[str, Any]:
        """Format new output as the choice of an event."""
        content = {"content": delta.text} if delta.token_ids or delta.text else {}
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        return self._event_choice(delta.index, content, logprobs, delta.finish_reason, delta.extension)

    def with_choices(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Wrap ``choices`` in a response object."""
        return {
            "id": self._id,
            "object": self._object,
            "created": self._created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[dict[int, float]] | None) -> dict[str, Any] | None:
        return None if logprobs is None else chat_logprobs(self.tokenizer, tokens, logprobs, self.top_logprobs)

    def _event_choice(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None, extension: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "recursify": extension,
        }
