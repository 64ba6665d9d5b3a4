"""Rows from files or the Hub, tokenized and packed so that documents do not attend to each other.

``datasets`` reads and TRL packs. A row is plain text (``text`` or ``content``), a ``prompt`` with a ``completion``, or
a chat (``messages``). Position ids of packed sequences restart with every document, and transformers' masks separate
documents where positions restart.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recursify.errors import TextError
from recursify.evaluation.text import PLAIN_SUFFIXES, default_text

from .settings import UptrainSettings

IGNORED = -100
"""Label of a token without loss."""

BUILDERS = dict.fromkeys(PLAIN_SUFFIXES, "text") | {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
"""Mapping from file suffixes to builders of ``datasets``."""

EVAL_FRACTION = 0.05
SHUFFLE_BUFFER = 10_000
"""Size of the buffer in which a stream is shuffled, in rows."""

Rows: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class TextData:
    """Packed sequences for training and evaluation.

    Attributes:
        train: Training rows with ``input_ids``, ``labels`` and ``seq_lengths``.
        evaluation: Held-out rows.
        name: Name of the data, for reports.
    """

    train: Rows
    evaluation: Dataset
    name: str


def prepare_data(settings: UptrainSettings, tokenizer: PreTrainedTokenizerBase) -> TextData:
    """Read, tokenize, shuffle and pack the data of the settings.

    Raises:
        TextError: Data is missing, unreadable, too short or has no tokens to learn; or a row has the wrong form, which
            the message names by file and line.
    """
    data = _pack_all(settings, tokenizer)
    # A stream cannot be checked without reading it, but its held-out rows can, and are probably similar.
    for rows, which in ((data.evaluation, "held-out "), (data.train, "")):
        if isinstance(rows, Dataset) and all(label == IGNORED for row in rows for label in row["labels"]):
            raise TextError(
                f"The {which}rows of {data.name} have no tokens to learn: no completion or assistant turn within "
                f"{settings.length} tokens. Give other rows, a larger length, or turn off completions_only."
            )
    return data


def _pack_all(settings: UptrainSettings, tokenizer: PreTrainedTokenizerBase) -> TextData:
    pack = _Packer(settings, tokenizer)
    sources = _sources(settings.data, "calibration", settings)
    name = ", ".join(settings.data or (source.name for source in sources))
    train = pack(sources, shuffle=True)
    if settings.data is None or settings.eval_data is not None:
        rows = pack(_sources(settings.eval_data, "held_out", settings), shuffle=False)
        first = list(rows.take(settings.eval_sequences))
        if not first:
            raise TextError("The held-out text does not fill one sequence. Give more text.")
        return TextData(train, Dataset.from_list(first), name)
    if isinstance(train, IterableDataset):
        raise TextError(f"{name} is streamed, so no part of it can be held out. Give --eval-data.")
    if len(train) < 2:
        raise TextError(
            f"{name} fills {len(train)} sequences of {settings.length} tokens, but at least 2 are needed, one of "
            f"them held out. Give more text, a shorter length, or separate evaluation text (--eval-data)."
        )
    size = max(1, min(settings.eval_sequences, round(EVAL_FRACTION * len(train))))
    return TextData(train.select(range(size, len(train))), train.select(range(size)), name)


@dataclass(frozen=True)
class _Source:
    """Rows of one form, with their files for error messages."""

    rows: Rows
    name: str
    files: tuple[Path, ...]


def _sources(
    names: Sequence[str] | None, split: Literal["calibration", "held_out"], settings: UptrainSettings
) -> list[_Source]:
    """Open files, folders and Hub data sets, or a split of the default text; files with one builder are one source."""
    if names is None:
        text = default_text(split)
        return [_Source(Dataset.from_dict({"text": text.documents}), text.name, ())]
    by_builder: dict[str, list[Path]] = {}
    sources = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in BUILDERS)
            if not files:
                raise TextError(f"'{path}' has no files of the types {', '.join(BUILDERS)}. Give another folder.")
        elif path.exists():
            files = [path]
        elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix not in BUILDERS:
            sources.append(_Source(_from_hub(name, settings), name, ()))
            continue
        else:
            raise TextError(f"There is no text at '{name}', and it is not a Hub data set (owner/name). Check the path.")
        for file in files:
            if file.suffix not in BUILDERS:
                raise TextError(f"'{file}' is not of a supported type ({', '.join(BUILDERS)}). Convert or rename it.")
            if file.stat().st_size:
                by_builder.setdefault(BUILDERS[file.suffix], []).append(file)
    for builder, files in by_builder.items():
        options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        paths = [str(file) for file in files]
        try:
            rows = load_dataset(builder, data_files=paths, split="train", streaming=settings.streaming, **options)
        except (DatasetGenerationError, ValueError, UnicodeDecodeError, OSError) as error:
            raise TextError(_why_unreadable(files, error)) from error
        sources.append(_Source(rows, ", ".join(file.name for file in files[:3]), tuple(files)))
    if not sources:
        raise TextError(f"{', '.join(names)}: empty. Give files with at least some thousand words of text.")
    return sources


def _from_hub(name: str, settings: UptrainSettings) -> Rows:
    try:
        return load_dataset(name, split=settings.data_split, streaming=settings.streaming)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise TextError(
            f"'{name}' is not a local file, and split '{settings.data_split}' of it cannot be loaded from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _why_unreadable(files: list[Path], error: Exception) -> str:
    """Describe the error with file and line, which ``datasets`` does not name."""
    for file in files:
        if file.suffix == ".parquet":
            continue
        data = file.read_bytes()
        try:
            content = data.decode("utf-8-sig")
        except UnicodeDecodeError as bad:
            return f"'{file}' is not UTF-8 (byte {bad.start}: 0x{data[bad.start]:02x}). Convert it first."
        if file.suffix != ".jsonl":
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError as bad:
                return f"{file}:{number} is not JSON ({bad}). Write one object per line."
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"{', '.join(map(str, files[:5]))} cannot be read: {reason}"


def _place(files: tuple[Path, ...], index: int) -> str:
    """``FILE:LINE`` of row ``index`` of a source."""
    for file in files:
        if file.suffix in (".jsonl", ".csv"):
            with open(file, newline="", encoding="utf-8-sig") as stream:
                if file.suffix == ".csv":
                    reader = csv.reader(stream)
                    lines = [reader.line_num for _ in reader][1:]
                else:
                    lines = [number for number, line in enumerate(stream, start=1) if line.strip()]
        elif file.suffix == ".parquet":
            import pyarrow.parquet

            lines = list(range(1, 1 + pyarrow.parquet.ParquetFile(file).metadata.num_rows))
        else:
            lines = [1]
        if index < len(lines):
            return f"{file}:{lines[index]}"
        index -= len(lines)
    return f"row {index + 1}"


def _encode_at(encode: Callable[[dict], dict], source: _Source, row: dict, index: int) -> dict:
    try:
        return encode(row)
    except TextError as error:
        raise TextError(f"{_place(source.files, index) if source.files else source.name}: {error}") from error


class _Packer:
    """Tokenizer and packer of rows of any supported form."""

    def __init__(self, settings: UptrainSettings, tokenizer: PreTrainedTokenizerBase):
        self.settings = settings
        self.tokenizer = tokenizer

    def __call__(self, sources: list[_Source], *, shuffle: bool) -> Rows:
        from trl import pack_dataset

        packed = []
        for source in sources:
            rows = source.rows
            if shuffle and isinstance(rows, IterableDataset):
                rows = rows.shuffle(seed=self.settings.seed, buffer_size=SHUFFLE_BUFFER)
            columns = rows.column_names or list(next(iter(rows.take(1)), {}))
            encode, is_chat = self._encoder(columns, source)
            tokenized = rows.map(partial(_encode_at, encode, source), with_indices=True, remove_columns=columns)
            # A split chat would teach answers without their questions; plain text can be split.
            packed.append(pack_dataset(tokenized, self.settings.length, "bfd" if is_chat else "bfd_split"))
        rows = packed[0] if len(packed) == 1 else concatenate_datasets(packed)
        # Packing sorts the rows of each source by length.
        return rows.shuffle(seed=self.settings.seed) if shuffle and isinstance(rows, Dataset) else rows

    def _encoder(self, columns: list[str], source: _Source) -> tuple[Callable[[dict], dict], bool]:
        """The function from a row to its tokens, and whether rows are chats or completions."""
        if "messages" in columns:
            if not self.tokenizer.chat_template:
                raise TextError(
                    f"{source.name} contains chats, but the model's tokenizer has no chat template. Give text or "
                    f"prompt/completion rows, or put a chat_template.jinja into the model's folder."
                )
            return self._encode_chat, True
        if "prompt" in columns and "completion" in columns:
            return self._encode_completion, True
        if "text" in columns or "content" in columns:
            return self._encode_text, False
        raise TextError(
            f"{source.name} has the fields {', '.join(columns)}. Give rows with 'text', with 'prompt' and "
            f"'completion', or with 'messages'."
        )

    def _encode_text(self, row: dict) -> dict[str, list[int]]:
        text = row.get("text", row.get("content"))
        if not isinstance(text, str):
            raise TextError(f"'text' is {type(text).__name__}, not a string. Fix the row.")
        ids = self._with_end(self.tokenizer(text, verbose=False)["input_ids"])
        return {"input_ids": ids, "labels": list(ids)}

    def _encode_completion(self, row: dict) -> dict[str, list[int]]:
        for field in ("prompt", "completion"):
            if isinstance(row[field], list):
                return self._encode_chat({"messages": [*_messages(row["prompt"]), *_messages(row["completion"])]})
            if not isinstance(row[field], str):
                raise TextError(f"'{field}' is {type(row[field]).__name__}, not a string. Fix the row.")
        encoded = self.tokenizer(row["prompt"] + row["completion"], return_offsets_mapping=True, verbose=False)
        ids = self._with_end(encoded["input_ids"])
        learned = [start >= len(row["prompt"]) for start, _ in encoded["offset_mapping"]]
        return self._labelled(ids, learned + [True] * (len(ids) - len(learned)))

    def _encode_chat(self, row: dict) -> dict[str, list[int]]:
        """Tokens of the rendered chat template; with ``completions_only``, only assistant turns have labels."""
        messages = _messages(row["messages"])
        text = self._render(messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learned = [True] * len(encoded["input_ids"])
        if self.settings.completions_only:
            spans = self._assistant_spans(messages, text)
            learned = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
        return self._labelled(encoded["input_ids"], learned)

    def _assistant_spans(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            until = self._render(messages[: index + 1])
            if not (text.startswith(before) and text.startswith(until)):
                raise TextError(
                    "the chat template renders a turn differently when another follows, so assistant turns cannot be "
                    "located. Give prompt/completion rows, or turn off completions_only."
                )
            spans.append((len(before), len(until)))
        return spans

    def _render(self, messages: list[dict], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise errors of jinja, ValueError, TypeError ...
            raise TextError(f"the chat template rejects it: {error}") from error

    def _labelled(self, ids: list[int], learned: list[bool]) -> dict[str, list[int]]:
        if not self.settings.completions_only:
            return {"input_ids": ids, "labels": list(ids)}
        labels = [token if keep else IGNORED for token, keep in zip(ids, learned, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise TextError("'messages' must be a list of at least one message.")
    for message in value:
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise TextError(f"a message has no string '{field}'. Fix the row.")
    return value


class Collator:
    """Collator of packed rows into ``input_ids``, ``labels`` and ``position_ids``, all ``[B, T]``.

    The first token of a document is not predicted, so its label is ``IGNORED``. The padding at the end of a row is a
    document of its own, so no attention mask is needed.

    Args:
        length: Sequence length ``T``.
        pad: Token id of padding; None for 0.
    """

    def __init__(self, length: int, pad: int | None):
        self.length = length
        self.pad = 0 if pad is None else pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        shape = len(rows), self.length
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        positions = torch.empty(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            used = len(row["input_ids"])
            ids[index, :used] = torch.as_tensor(row["input_ids"])
            labels[index, :used] = torch.as_tensor(row["labels"])
            lengths = [int(length) for length in row["seq_lengths"]] + [self.length - used]
            positions[index] = torch.cat([torch.arange(length) for length in lengths])
        labels[positions == 0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
