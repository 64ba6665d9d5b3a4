"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .responses import Logged

UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token by itself."""
    return tokenizer.decode([token])


def completion_logprobs(
    tokenizer: Any, tokens: Sequence[int], logged: Sequence[Logged | None], offset: int = 0
) -> dict[str, Any]:
    """Lists by token. A token without an entry, the first one of a prompt, has None.

    Args:
        tokenizer: Of the model.
        tokens: Those that were said.
        logged: Per token, best first.
        offset: Where the first of them begins in the text.
    """
    texts = [token_text(tokenizer, token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [row and row[token] for token, row in zip(tokens, logged, strict=True)],
        "top_logprobs": [row and _by_text(tokenizer, row) for row in logged],
        "text_offset": offsets,
    }


def _by_text(tokenizer: Any, row: Logged) -> dict[str, float]:
    """Tokens that read alike by themselves, parts of characters, share a name; the likeliest has it."""
    found: dict[str, float] = {}
    for token, value in row.items():
        text = token_text(tokenizer, token)
        found[text] = max(value, found.get(text, value))
    return found


def chat_logprobs(tokenizer: Any, tokens: Sequence[int], logged: Sequence[Logged], count: int) -> dict[str, Any]:
    """An object per token, with ``count`` first choices."""
    content = []
    for token, row in zip(tokens, logged, strict=True):
        best = [_entry(tokenizer, each, row[each]) for each in list(row)[:count]]
        content.append(_entry(tokenizer, token, row[token]) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": None if UNREADABLE in text else list(text.encode())}
