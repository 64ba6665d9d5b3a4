"""Vocabulary of a ``.gguf``: tokens, their kinds, special ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from recursify.errors import CheckpointError, UnsupportedModelError

from .file import GgufFile
from .pre_tokenizers import PRE_TOKENIZERS

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Names in ``tokenizer.ggml.model``."""

NO_TOKENIZER = (None, "none", "no_vocab")

SPECIAL_KEYS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
"""Fields of a config, and the keys that have them."""

UNSUPPORTED_KEYS = {
    "add_sep_token": False,
    "remove_extra_whitespaces": False,
    "precompiled_charsmap": [],
    "suppress_tokens": [],
}
"""Keys of the tokenizer that are accepted with the value that changes nothing."""


class TokenKind(IntEnum):
    """Kinds of tokens (``tokenizer.ggml.token_type``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a model.

    Attributes:
        tokens: Text of every token, by id.
        kinds: Kind of every token.
        scores: Score of every token, or None.
        merges: Pairs of tokens in order of their rank, or None.
    """

    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None


def require_tokenizer(file: GgufFile) -> None:
    """Check, from the header, that the tokenizer of a file can be built.

    Raises:
        UnsupportedModelError: Its kind or pre-tokenizer is unknown, or it has an option that is not supported.
    """
    model = file.get("tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UnsupportedModelError(
            f"'{file.path}' has a tokenizer of the kind '{model}' (tokenizer.ggml.model). Those that are read are: "
            f"{BYTE_LEVEL}, {SENTENCEPIECE}. Convert the original checkpoint instead."
        )
    pre = file.get("tokenizer.ggml.pre", "default")
    if model == BYTE_LEVEL and pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"'{file.path}' has the pre-tokenizer '{pre}' (tokenizer.ggml.pre), which is not known here. Known are: "
            f"{', '.join(PRE_TOKENIZERS)}. Convert the original checkpoint instead."
        )
    for key, neutral in UNSUPPORTED_KEYS.items():
        value = file.get(f"tokenizer.ggml.{key}", neutral)
        if value != neutral:
            raise UnsupportedModelError(
                f"'{file.path}' has tokenizer.ggml.{key}, which is not supported. Convert the original checkpoint "
                f"instead."
            )


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Read the tokens.

    Raises:
        CheckpointError: There are none, one occurs twice, or there are more than the model has.
    """
    tokens = file.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"'{file.path}' has a tokenizer without tokens. Fetch the model again.")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]  # as llama.cpp names them
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise CheckpointError(f"'{file.path}' has a token twice, {twice[0]!r}. Fetch the model again.")
    rows = file.shapes["token_embd.weight"][0]
    if len(tokens) > rows:
        raise CheckpointError(
            f"'{file.path}' has {len(tokens)} tokens, but an embedding for {rows}. They belong to different models: "
            f"fetch the model again."
        )
    kinds = list(file.get("tokenizer.ggml.token_type", [TokenKind.NORMAL] * len(tokens)))
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"'{file.path}' has {len(tokens)} tokens, and kinds of {len(kinds)} (tokenizer.ggml.token_type). Fetch the "
            f"model again."
        )
    merges = file.get("tokenizer.ggml.merges")
    return Vocabulary(
        tokens,
        kinds,
        file.get("tokenizer.ggml.scores"),
        None if merges is None else [_split_merge(merge) for merge in merges],
    )


def _split_merge(merge: str) -> tuple[str, str]:
    place = merge.find(" ", 1)  # the first part may be a space itself
    return merge[:place], merge[place + 1 :]


def special_ids(file: GgufFile) -> dict[str, Any]:
    """Ids of BOS, EOS and padding, None if the file has none; those of SentencePiece have defaults in llama.cpp."""
    return {field: special_id(file, key) for field, key in SPECIAL_KEYS.items()}


def special_id(file: GgufFile, key: str) -> int | None:
    """Id under ``tokenizer.ggml.{key}``; one outside the vocabulary does not count, as in llama.cpp."""
    sentencepiece = file.get("tokenizer.ggml.model") == SENTENCEPIECE
    default = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}.get(key) if sentencepiece else None
    number = file.get(f"tokenizer.ggml.{key}", default)
    size = file.shapes["token_embd.weight"][0]
    return int(number) if number is not None and 0 <= number < size else None
