"""Response format of ``/v1/completions``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from recursify.engine import RequestOutput
from recursify.server.engine_process import OutputChunk

from .logprobs import completion_logprobs
from .responses import Logprobs, ResponseFormat


class Echo(NamedTuple):
    """A prompt to repeat before its completion, with log-probabilities if requested; the first token has none."""

    text: str
    token_ids: list[int]
    logprobs: list[Logprobs | None] | None


class CompletionFormat(ResponseFormat):
    """Format of one response, to one prompt or several; ``echoes`` has the prompt of each completion, if requested."""

    def __init__(self, model: str, tokenizer: Any, echoes: Sequence[Echo] = ()) -> None:
        super().__init__(model, tokenizer, "text_completion", "cmpl")
        self.echoes = echoes
        self._offsets: Counter[int] = Counter()

    def new_content(self, index: int, chunk: OutputChunk) -> dict[str, Any]:
        offset = self._offsets[index]
        self._offsets[index] += len(chunk.text)
        logprobs = chunk.logprobs and completion_logprobs(self.tokenizer, chunk.token_ids, chunk.logprobs, offset)
        return {"text": chunk.text, "logprobs": logprobs}

    def finished_content(self, index: int, output: RequestOutput) -> dict[str, Any]:
        echo = self.echoes[index] if self.echoes else Echo("", [], [])
        logprobs = None
        if output.logprobs is not None and echo.logprobs is not None:
            rows = [*echo.logprobs, *output.logprobs]
            logprobs = completion_logprobs(self.tokenizer, [*echo.token_ids, *output.token_ids], rows)
        return {"text": echo.text + output.text, "logprobs": logprobs}
