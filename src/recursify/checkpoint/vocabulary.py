"""Check that a model knows the tokens of a text: tokenizers may have more entries than the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recursify.errors import RecursifyError, TextError


def require_known_tokens(
    ids: Iterable[int],
    vocab_size: int,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    error: type[RecursifyError] = TextError,
) -> None:
    """Check token ids against a vocabulary of ``vocab_size`` entries.

    A tokenizer that is larger than the model's vocabulary is accepted as long as no text uses its further entries, as
    in transformers.

    Args:
        ids: Token ids of a text.
        vocab_size: Number of rows of the model's embedding.
        tokenizer: Tokenizer that made the ids, for the message; None for ids that a program gave.
        name: Name of a field with the ids, for the message; None for a text.
        error: Class of the error.

    Raises:
        RecursifyError: An id is negative, or not below ``vocab_size``; of the class ``error``.
    """
    token = next((token for token in ids if not 0 <= token < vocab_size), None)
    if token is None:
        return
    problem = f"is not in the model's vocabulary of {vocab_size} entries"
    if tokenizer is None or not 0 <= token < len(tokenizer):
        subject = f"Token {token}" if name is None else f"Token {token} of {name}"
        raise error(f"{subject} {problem}. Give ids from 0 to {vocab_size - 1}.")
    raise error(
        f"The tokenizer has {len(tokenizer)} entries, and token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) "
        f"{problem}. Use the tokenizer of the model, or first enlarge the dense model "
        f"(model.resize_token_embeddings({len(tokenizer)})) and train the new entries."
    )
