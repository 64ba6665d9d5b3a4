"""Response format of ``/v1/completions``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from recursify.engine import RequestOutput
from recursify.server.engine_process import OutputChunk

from .logprobs import TextOffsets, completion_logprobs
from .responses import Logprobs, ResponseFormat


class Echo(NamedTuple):
    """A prompt to repeat before its completion, with log-probabilities if requested; the first token has none."""

    text: str
    token_ids: list[int]
    logprobs: list[Logprobs | None] | None


class CompletionFormat(ResponseFormat):
    """Format of one response, to one prompt or several.

    Args:
        model: Name of the model.
        tokenizer: Tokenizer of the model.
        echoes: Prompt of each completion, if it is to be repeated.
        skip_special_tokens: Flag of the request.
    """

    def __init__(
        self, model: str, tokenizer: Any, echoes: Sequence[Echo] = (), *, skip_special_tokens: bool = True
    ) -> None:
        super().__init__(model, tokenizer, "text_completion", "cmpl")
        self.echoes = echoes
        self._text_offsets = partial(TextOffsets, tokenizer, skip_special_tokens=skip_special_tokens)
        self._streamed: defaultdict[int, TextOffsets] = defaultdict(self._text_offsets)

    def new_content(self, index: int, chunk: OutputChunk) -> dict[str, Any]:
        logprobs, tokens = None, chunk.token_ids
        if chunk.logprobs is not None:
            offsets = self._streamed[index].advance(tokens)
            logprobs = completion_logprobs(self.tokenizer, tokens, chunk.logprobs, offsets)
        return {"text": chunk.text, "logprobs": logprobs}

    def finished_content(self, index: int, output: RequestOutput) -> dict[str, Any]:
        echo = self.echoes[index] if self.echoes else Echo("", [], [])
        logprobs = None
        if output.logprobs is not None and echo.logprobs is not None:
            offsets = self._text_offsets().advance(echo.token_ids)
            offsets += self._text_offsets(len(echo.text)).advance(output.token_ids)
            tokens, rows = [*echo.token_ids, *output.token_ids], [*echo.logprobs, *output.logprobs]
            logprobs = completion_logprobs(self.tokenizer, tokens, rows, offsets)
        return {"text": echo.text + output.text, "logprobs": logprobs}
