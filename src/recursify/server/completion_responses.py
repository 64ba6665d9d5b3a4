"""Response format of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recursify.engine import RequestOutput

from .logprobs import completion_logprobs
from .responses import CompletionDelta, Logprobs, ResponseFormat


@dataclass(frozen=True)
class Echo:
    """A prompt to repeat before its completion.

    Attributes:
        text: Text of the prompt.
        token_ids: Tokens of the prompt.
        logprobs: Log-probabilities per token, if requested; None for the first token, which nothing predicts.
    """

    text: str
    token_ids: list[int]
    logprobs: list[Logprobs | None] | None


class CompletionFormat(ResponseFormat):
    """Format of one response, to one prompt or several.

    Args:
        model: Name of the model for clients.
        tokenizer: Tokenizer of the model.
        echoes: Prompt to repeat for each completion; empty to repeat none.
    """

    def __init__(self, model: str, tokenizer: Any, echoes: Sequence[Echo] = ()) -> None:
        super().__init__(model, tokenizer, "text_completion", "cmpl")
        self.echoes = echoes
        self._offsets: dict[int, int] = {}

    def event_choice(self, delta: CompletionDelta) -> dict[str, Any]:
        """Format new output as the choice of an event."""
        offset = self._offsets.get(delta.index, 0)
        logprobs = delta.logprobs
        self._offsets[delta.index] = offset + len(delta.text)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs and completion_logprobs(self.tokenizer, delta.token_ids, logprobs, offset),
            "finish_reason": delta.finish_reason,
            "recursify": delta.extension,
        }

    def finished_choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Format a finished completion as a choice, after the echo of its prompt."""
        text, tokens = output.text, output.token_ids
        logprobs: list[Logprobs | None] | None = None if output.logprobs is None else [*output.logprobs]
        if self.echoes:
            echo = self.echoes[index]
            text, tokens = echo.text + text, [*echo.token_ids, *tokens]
            logprobs = None if logprobs is None or echo.logprobs is None else [*echo.logprobs, *logprobs]
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else completion_logprobs(self.tokenizer, tokens, logprobs),
            "finish_reason": output.finish_reason,
            "recursify": {"depths": output.depths},
        }
