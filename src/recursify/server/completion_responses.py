"""``/v1/completions``: how its answers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recursify.engine import RequestOutput

from .logprobs import completion_logprobs
from .responses import CompletionDelta, Logged, new_id, now


@dataclass(frozen=True)
class Echo:
    """A prompt to be repeated before its answers.

    Attributes:
        text: Of the prompt.
        token_ids: Of the prompt.
        logged: Per token, if asked for; None for the first, which nothing predicts.
    """

    text: str
    token_ids: list[int]
    logged: list[Logged | None] | None


class CompletionFormat:
    """One answer of the server, for one or several prompts.

    Args:
        model: The name under which the model is offered.
        tokenizer: Of the model.
        echoes: Per choice, what is repeated; empty for nothing.
    """

    def __init__(self, model: str, tokenizer: Any, echoes: Sequence[Echo] = ()) -> None:
        self.model, self.tokenizer, self.echoes = model, tokenizer, echoes
        self._id, self._created = new_id("cmpl"), now()
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """All choices, to be completed with the usage."""
        return self.with_choices([self._choice(index, output) for index, output in enumerate(outputs)])

    def opening(self, count: int) -> list[dict[str, Any]]:
        """A stream begins with its first token."""
        return []

    def event(self, said: CompletionDelta) -> dict[str, Any]:
        """The choice of one event."""
        offset = self._offsets.get(said.index, 0)
        logged = said.logprobs
        self._offsets[said.index] = offset + len(said.text)
        return {
            "index": said.index,
            "text": said.text,
            "logprobs": logged and completion_logprobs(self.tokenizer, said.token_ids, logged, offset),
            "finish_reason": said.finish_reason,
            "recursify": said.extension,
        }

    def with_choices(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """An object around ``choices``."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        text, tokens = output.text, output.token_ids
        logged: list[Logged | None] | None = None if output.logprobs is None else [*output.logprobs]
        if self.echoes:
            echo = self.echoes[index]
            text, tokens = echo.text + text, [*echo.token_ids, *tokens]
            logged = None if logged is None or echo.logged is None else [*echo.logged, *logged]
        return {
            "index": index,
            "text": text,
            "logprobs": None if logged is None else completion_logprobs(self.tokenizer, tokens, logged),
            "finish_reason": output.finish_reason,
            "recursify": {"depths": output.depths},
        }
