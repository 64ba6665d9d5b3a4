"""Text to measure and calibrate on, from files or Python's own help topics, and its token windows."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import TextError

from .rows import Row, find_files, read_rows

HELD_OUT_EVERY = 5
"""Interval at which Python's help topics, in alphabetical order, are held out for evaluation."""


@dataclass(frozen=True)
class Text:
    """Documents, and their name in a report."""

    name: str
    documents: list[str]


def default_text(split: Literal["calibration", "held_out"]) -> Text:
    """The help topics of CPython (``pydoc_data.topics``), 700 kB of English prose and grammar under the PSF license.

    Calibration and held-out topics are disjoint.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = split == "held_out"
    chosen = [name for index, name in enumerate(names) if (index % HELD_OUT_EVERY == 0) == held_out]
    which = f"each {HELD_OUT_EVERY}th topic" if held_out else f"all but each {HELD_OUT_EVERY}th topic"
    return Text(f"pydoc_data.topics of Python {platform.python_version()}, {which}", [topics[n] for n in chosen])


def read_text(paths: str | Path | Iterable[str | Path]) -> Text:
    """Read documents from files, or from all text files under a folder.

    A plain file is one document, and so is a row of any other: its ``text``, its ``content``, its ``prompt`` with its
    ``completion``, or the joined contents of its ``messages``.

    Raises:
        TextError: A file is missing, empty, damaged, binary or not UTF-8, or a row has no text field.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for path in paths for file in find_files(Path(path))]
    documents = [document for file in files for row in read_rows(file) if (document := _document(row)).strip()]
    if not documents:
        raise TextError(
            f"The text in {', '.join(map(str, paths))} is empty. Give a file with some thousand words of prose."
        )
    return Text(", ".join(Path(path).name for path in paths), documents)


def _document(row: Row) -> str:
    fields = row.fields
    for key in ("text", "content"):
        if isinstance(fields.get(key), str):
            return fields[key]
    parts = [fields.get("prompt"), fields.get("completion")]
    if len(texts := [part for part in parts if isinstance(part, str)]) == len(parts):
        return "".join(texts)
    lists = parts if fields.get("messages") is None else [fields["messages"]]
    messages = [message for part in lists if isinstance(part, list) for message in part if isinstance(message, dict)]
    contents = [message.get("content") for message in messages if not message.get("tool_calls")]
    texts = [content for content in contents if isinstance(content, str)]
    if texts and len(texts) == len(contents):
        return "\n".join(texts)
    raise TextError(
        f"{row.place} has no 'text' string (nor 'content', nor 'prompt' and 'completion', nor 'messages'); it has: "
        f"{', '.join(fields)}."
    )


def text_start(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer puts before a text (BOS); empty for a tokenizer that adds none.

    They are found by comparing a text with and without special tokens, since configs state it in different fields.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for count in range(len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return whole[:count]
    return []


def num_context(tokenizer: Any) -> int:
    """Number of leading tokens of a window that are not predicted: those of :func:`text_start`, at least one."""
    return max(1, len(text_start(tokenizer)))


def token_windows(
    tokenizer: Any,
    text: Text,
    length: int,
    *,
    max_tokens: int | None = None,
    min_windows: int = 1,
    vocab_size: int | None = None,
) -> Tensor:
    """Tokenize ``text`` and cut it into windows ``[N, length]`` int64; a shorter rest is dropped.

    Each window begins as the tokenizer begins a text (:func:`text_start`), within its ``length``.

    Args:
        tokenizer: Tokenizer of the model.
        text: Documents, which are joined.
        length: Tokens per window.
        max_tokens: Maximum number of tokens; None takes the whole text.
        min_windows: Minimum number of windows.
        vocab_size: Number of rows of the model's embedding, to check ids against; None does not check.

    Raises:
        TextError: There are fewer than ``min_windows`` windows, or a token is not in the model's vocabulary.
    """
    start = text_start(tokenizer)
    step = length - len(start)
    if step < 1:
        raise TextError(f"A window of {length} tokens has no room after the {len(start)} that begin a text. Use more.")
    most = None if max_tokens is None else max(max_tokens // length, 1)
    if most is not None and most < min_windows:
        raise TextError(
            f"{max_tokens} tokens are fewer than {min_windows} windows of {length}. Use at least "
            f"{min_windows * length} tokens, or shorter windows."
        )
    # Tokens are far shorter than 16 characters on average, so a large corpus need not be tokenized whole.
    joined = "\n\n".join(text.documents)
    if max_tokens is not None:
        joined = joined[: 16 * max_tokens]
    ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // step
    if most is not None:
        count = min(count, most)
    if count < min_windows:
        raise TextError(
            f"{text.name} is too short: {len(ids)} tokens, and {min_windows} windows of {step} are needed. Give more "
            f"text, or a shorter length."
        )
    windows = torch.tensor(ids[: count * step], dtype=torch.int64).view(count, step)
    if vocab_size is not None:
        require_known_tokens([*start, *windows.unique().tolist()], vocab_size, tokenizer)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), windows], dim=1)
