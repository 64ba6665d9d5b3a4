"""Response format of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from recursify.engine import RequestOutput
from recursify.server.engine_process import OutputChunk

from .logprobs import chat_logprobs
from .responses import ResponseFormat, choice


class ChatFormat(ResponseFormat):
    """Format of one response, with the ``top_logprobs`` likeliest tokens if log-probabilities are requested."""

    def __init__(self, model: str, tokenizer: Any, top_logprobs: int, *, stream: bool) -> None:
        super().__init__(model, tokenizer, "chat.completion.chunk" if stream else "chat.completion", "chatcmpl")
        self.top_logprobs = top_logprobs

    def finished_content(self, index: int, output: RequestOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(output)}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Return one choice per completion, with the role of the speaker."""
        content = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [choice(index, content, None, depths=[]) for index in range(count)]

    def new_content(self, index: int, chunk: OutputChunk) -> dict[str, Any]:
        delta = {"content": chunk.text} if chunk.token_ids or chunk.text else {}
        return {"delta": delta, "logprobs": self._logprobs(chunk)}

    def _logprobs(self, output: RequestOutput | OutputChunk) -> dict[str, Any] | None:
        rows = output.logprobs
        return None if rows is None else chat_logprobs(self.tokenizer, output.token_ids, rows, self.top_logprobs)
