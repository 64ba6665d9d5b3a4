"""Log-probabilities in the formats of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recursify.engine.detokenizer import Detokenizer

from .responses import Logprobs

UNREADABLE = "\N{REPLACEMENT CHARACTER}"


class TextOffsets:
    """Offsets of one completion's tokens into its text, which begins ``start`` characters into a longer one.

    The tokens of one character have the offset of that character, and those of bytes that form none the offset of the
    first of them.
    """

    def __init__(self, tokenizer: Any, start: int = 0, *, skip_special_tokens: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer, (), skip_special_tokens=skip_special_tokens)
        self._tokenizer, self._start = tokenizer, start

    def advance(self, tokens: Sequence[int]) -> list[int]:
        """Return the number of characters before each of the next ``tokens``."""
        offsets = []
        for token in tokens:
            offset = len(self._detokenizer.text)
            self._detokenizer.add(token)
            piece = self._detokenizer.text[offset:]
            if UNREADABLE in piece and UNREADABLE not in self._tokenizer.decode([token]):
                offset += piece.rindex(UNREADABLE) + 1  # bytes of earlier tokens that this one does not complete
            offsets.append(self._start + offset)
        return offsets


def completion_logprobs(
    tokenizer: Any, tokens: Sequence[int], logprobs: Sequence[Logprobs | None], offsets: Sequence[int]
) -> dict[str, Any]:
    """Format log-probabilities as lists with an entry per token, and the tokens' ``offsets`` into the text."""
    return {
        "tokens": [tokenizer.decode([token]) for token in tokens],
        "token_logprobs": [row and row[token] for token, row in zip(tokens, logprobs, strict=True)],
        "top_logprobs": [row and _by_text(tokenizer, row) for row in logprobs],
        "text_offset": list(offsets),
    }


def _by_text(tokenizer: Any, row: Logprobs) -> dict[str, float]:
    """Key log-probabilities by text; of tokens with the same text (parts of characters) the likeliest is kept."""
    by_text: dict[str, float] = {}
    for token, value in row.items():
        text = tokenizer.decode([token])
        by_text[text] = max(value, by_text.get(text, value))
    return by_text


def chat_logprobs(tokenizer: Any, tokens: Sequence[int], logprobs: Sequence[Logprobs], count: int) -> dict[str, Any]:
    """Format log-probabilities as an object per token, with the ``count`` likeliest tokens."""
    content = []
    for token, row in zip(tokens, logprobs, strict=True):
        top = [_entry(tokenizer, candidate, row[candidate]) for candidate in list(row)[:count]]
        content.append(_entry(tokenizer, token, row[token]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": None if UNREADABLE in text else list(text.encode())}
