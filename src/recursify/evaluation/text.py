"""Text from files, and the default text: Python's own help topics."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import TextError

PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".text")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".json", ".parquet")
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

    A plain file is one document, and so is a row of JSONL or Parquet: its ``text``, its ``content``, or the joined
    contents of its ``messages``.

    Raises:
        TextError: A file is missing, empty, binary, not UTF-8, or has no text field.
    """
    documents: list[str] = []
    names = []
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
            if not files:
                raise TextError(f"'{path}' contains no text file ({', '.join(SUFFIXES)}).")
        elif not path.exists():
            raise TextError(f"There is no text at '{path}'.")
        for file in files:
            documents += _read_file(file)
        names.append(path.name)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(
            f"The text in {', '.join(map(str, paths))} is empty. Give a file with some thousand words of prose."
        )
    return Text(", ".join(names), documents)


def _read_file(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        return _read_parquet(file)
    data = file.read_bytes()
    if b"\0" in data[:65536]:
        raise TextError(f"'{file}' is binary. Give plain text, JSONL or Parquet.")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"'{file}' is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}). Convert it first, for instance "
            f"with: iconv -t UTF-8"
        ) from error
    if file.suffix in (".jsonl", ".json"):
        return [
            _text_of(_parse(line, file, number), f"{file}:{number}")
            for number, line in enumerate(content.splitlines(), start=1)
            if line.strip()
        ]
    return [content]


def _parse(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise TextError(f"{file}:{number} is not JSON ({error}). JSONL has one object per line.") from error


def _read_parquet(file: Path) -> list[str]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:  # pyarrow raises classes without a common base for a damaged file
        raise TextError(f"'{file}' cannot be read as Parquet: {error}") from error
    return [_text_of(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key in ("text", "content"):
            if isinstance(row.get(key), str):
                return row[key]
        messages = row.get("messages")
        if isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        ):
            return "\n".join(message["content"] for message in messages)
    fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise TextError(f"{where} has no 'text' string (nor 'content', nor 'messages'); it has: {fields}.")


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
    # Tokens are far shorter than 16 characters on average, so a large corpus need not be tokenized whole.
    joined = "\n\n".join(text.documents)
    if max_tokens is not None:
        joined = joined[: 16 * max_tokens]
    ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // step
    if max_tokens is not None:
        count = min(count, max(max_tokens // length, 1))
    if count < min_windows:
        raise TextError(
            f"{text.name} is too short: {len(ids)} tokens, and {min_windows} windows of {step} are needed. Give more "
            f"text, or a shorter length."
        )
    windows = torch.tensor(ids[: count * step], dtype=torch.int64).view(count, step)
    if vocab_size is not None:
        require_known_tokens([*start, *windows.unique().tolist()], vocab_size, tokenizer)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), windows], dim=1)
