"""``/v1/chat/completions``: how its answers are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recursify.engine import RequestOutput

from .logprobs import chat_logprobs
from .responses import CompletionDelta, new_id, now


class ChatFormat:
    """One answer of the server.

    Args:
        model: The name under which the model is offered.
        tokenizer: Of the model.
        top_logprobs: First choices per token, where log-probabilities are asked for.
        stream: Whether it is sent as it comes.
    """

    def __init__(self, model: str, tokenizer: Any, top_logprobs: int, *, stream: bool) -> None:
        self.model, self.tokenizer, self.top_logprobs = model, tokenizer, top_logprobs
        self._kind = "chat.completion.chunk" if stream else "chat.completion"
        self._id, self._created = new_id("chatcmpl"), now()

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """All choices, to be completed with the usage."""
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
        """A stream begins with the role of who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._delta(index, delta, None, None, {"depths": []}) for index in range(count)]

    def event(self, said: CompletionDelta) -> dict[str, Any]:
        """The choice of one event."""
        delta = {"content": said.text} if said.token_ids or said.text else {}
        logprobs = self._logprobs(said.token_ids, said.logprobs)
        return self._delta(said.index, delta, logprobs, said.finish_reason, said.extension)

    def with_choices(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """An object around ``choices``."""
        return {
            "id": self._id,
            "object": self._kind,
            "created": self._created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def _logprobs(self, tokens: Sequence[int], logged: Sequence[dict[int, float]] | None) -> dict[str, Any] | None:
        return None if logged is None else chat_logprobs(self.tokenizer, tokens, logged, self.top_logprobs)

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None, extension: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "recursify": extension,
        }
