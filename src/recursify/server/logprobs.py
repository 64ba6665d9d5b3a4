"""Log-probabilities in the formats of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .responses import Logprobs

UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def completion_logprobs(
    tokenizer: Any, tokens: Sequence[int], logprobs: Sequence[Logprobs | None], offset: int = 0
) -> dict[str, Any]:
    """Format log-probabilities as lists with an entry per token, of which the first is ``offset`` into the text."""
    texts = [tokenizer.decode([token]) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [row and row[token] for token, row in zip(tokens, logprobs, strict=True)],
        "top_logprobs": [row and _by_text(tokenizer, row) for row in logprobs],
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
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
