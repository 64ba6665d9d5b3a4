"""Packed sequences for uptraining, from files or the Hub; documents do not attend to each other.

Files are read by ``evaluation/rows.py`` and data sets of the Hub by ``datasets``; TRL packs. Position ids of packed
sequences restart with every document, and transformers' masks separate documents where positions restart.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recursify.errors import TextError
from recursify.evaluation.rows import PLAIN_SUFFIXES, SUFFIXES, find_files, read_rows, without_nulls
from recursify.evaluation.text import default_text

from .encoding import IGNORED, RowEncoder, Tokens, form_of
from .settings import UptrainSettings

logger = logging.getLogger(__name__)

EVAL_FRACTION = 0.05
SHUFFLE_BUFFER = 10_000
"""Size of the buffer in which a stream is shuffled, in rows."""
FEATURES = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})

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


def prepare_data(settings: UptrainSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TextData:
    """Read, tokenize, shuffle and pack the data of the settings.

    Args:
        settings: Settings of the run.
        tokenizer: Tokenizer of the model.
        vocab_size: Number of rows of the model's embedding.

    Raises:
        TextError: Data is missing, unreadable, too short or has no tokens to learn; or a row has the wrong form or a
            token that the model does not know, which the message names by file and line.
    """
    with readable(", ".join(settings.data or ("the default text",))):
        data = _pack_all(settings, tokenizer, vocab_size)
    # A stream cannot be checked without reading it, but its held-out rows can, and are probably similar.
    for rows, which in ((data.evaluation, "held-out "), (data.train, "")):
        if isinstance(rows, Dataset) and all(label == IGNORED for row in rows for label in row["labels"]):
            raise TextError(
                f"The {which}rows of {data.name} have no tokens to learn: no completion or assistant turn within "
                f"{settings.length} tokens. Give other rows, a larger length, or turn off completions_only."
            )
    return data


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Context in which a damaged row of the data ``name`` is a TextError, whichever library finds it."""
    try:
        yield
    except (DatasetGenerationError, pa.ArrowException) as error:
        if isinstance(error.__cause__, TextError):
            raise error.__cause__ from None
        raise TextError(
            f"{name} cannot be read: {str(error.__cause__ or error).splitlines()[0]} Correct its files, or download "
            f"them and give them by path, which names the row."
        ) from error


def _pack_all(settings: UptrainSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TextData:
    pack = _Packer(settings, tokenizer, vocab_size)
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
    """Rows that are packed alike: those of files, or a data set.

    Attributes:
        name: Name for messages.
        rows: Rows of a data set; None for files.
        files: Files.
        is_whole: True for chats and completions: a split one would teach answers without their questions.
    """

    name: str
    rows: Rows | None = None
    files: tuple[Path, ...] = ()
    is_whole: bool = False


def _sources(
    names: Sequence[str] | None, split: Literal["calibration", "held_out"], settings: UptrainSettings
) -> list[_Source]:
    """Open files, folders and Hub data sets, or a split of the default text."""
    if names is None:
        text = default_text(split)
        return [_Source(text.name, Dataset.from_dict({"text": text.documents}))]
    sources: list[_Source] = []
    files: dict[bool, list[Path]] = {}
    for name in names:
        path = Path(name)
        if not path.exists():
            if not _is_hub_id(name):
                raise TextError(
                    f"There is no text at '{name}', and it is not a Hub data set (owner/name). Check the path."
                )
            sources.append(_open_hub(name, settings))
            continue
        for file in find_files(path):
            if file.stat().st_size:
                files.setdefault(_is_whole(file), []).append(file)
    for is_whole, found in files.items():
        name = ", ".join(file.name for file in found[:3])
        sources.append(_Source(name, files=tuple(found), is_whole=is_whole))
    if not sources:
        raise TextError(f"{', '.join(names)}: empty. Give files with at least some thousand words of text.")
    return sources


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(name).suffix not in SUFFIXES


def _is_whole(file: Path) -> bool:
    """Tell by the first row whether a file has chats or completions."""
    if file.suffix.lower() in PLAIN_SUFFIXES:
        return False
    for row in read_rows(file):
        return _form(row.fields, row.place) != "text"
    return False


def _form(fields: dict[str, Any], place: str) -> str:
    try:
        return form_of(fields)
    except TextError as error:
        raise TextError(f"{place}: {error}") from error


def _open_hub(name: str, settings: UptrainSettings) -> _Source:
    try:
        with readable(f"'{name}'"):
            rows = load_dataset(name, split=settings.data_split, streaming=settings.streaming)
            first: dict[str, Any] = next(iter(rows.take(1)), {})
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise TextError(
            f"'{name}' is not a local file, and split '{settings.data_split}' of it cannot be loaded from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return _Source(name, rows, is_whole=_form(first, name) != "text")


# --- Encoding and packing --------------------------------------------------------------------------------------------


class _Packer:
    """Encoder and packer of sources."""

    def __init__(self, settings: UptrainSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self.settings = settings
        self.encode = RowEncoder(tokenizer, vocab_size, settings.length, completions_only=settings.completions_only)

    def __call__(self, sources: list[_Source], *, shuffle: bool) -> Rows:
        from trl import pack_dataset

        packed = []
        for source in sources:
            tokenized = self._tokenized(source)
            if shuffle and isinstance(tokenized, IterableDataset):
                tokenized = tokenized.shuffle(seed=self.settings.seed, buffer_size=SHUFFLE_BUFFER)
            if source.is_whole and isinstance(tokenized, Dataset):
                _report_cut_rows(tokenized, source.name, self.settings.length)
            packed.append(pack_dataset(tokenized, self.settings.length, "bfd" if source.is_whole else "bfd_split"))
        rows = packed[0] if len(packed) == 1 else concatenate_datasets(packed)
        # Packing sorts the rows of each source by length.
        return rows.shuffle(seed=self.settings.seed) if shuffle and isinstance(rows, Dataset) else rows

    def _tokenized(self, source: _Source) -> Rows:
        """Tokens of every row, prepared and cached on disk, or streamed."""
        encode = _SourceEncoder(self.encode, source.name, source.is_whole, reports=self.settings.streaming)
        if source.rows is not None:
            columns = source.rows.column_names or list(next(iter(source.rows.take(1)), {}))
            options = {"batched": True, "with_indices": True, "remove_columns": columns, "features": FEATURES}
            return source.rows.map(encode.batch, **options)
        # datasets finds prepared rows by these arguments: a file with other contents is read again.
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
        kind = IterableDataset if self.settings.streaming else Dataset
        return kind.from_generator(encode.files, features=FEATURES, gen_kwargs={"files": stats})


@dataclass(frozen=True)
class _SourceEncoder:
    """Encoder of the rows of one source; ``reports`` if it warns of the first row that is cut."""

    encode: RowEncoder
    name: str
    is_whole: bool
    reports: bool

    def files(self, files: list[tuple[str, int, int]]) -> Iterator[Tokens]:
        """Yield the tokens of the rows of files, given with size and time of change."""
        for name, *_ in files:
            for row in read_rows(Path(name)):
                yield from self._sequences(row.fields, row.place)

    def batch(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        """Return the tokens of a batch of a data set."""
        encoded: dict[str, list[list[int]]] = {name: [] for name in FEATURES}
        for place, values in enumerate(zip(*columns.values(), strict=True)):
            fields = {name: without_nulls(value) for name, value in zip(columns, values, strict=True)}
            for tokens in self._sequences(fields, f"{self.name}, row {indices[place] + 1}"):
                for name, ids in tokens.items():
                    encoded[name].append(ids)
        return encoded

    def _sequences(self, fields: dict[str, Any], place: str) -> list[Tokens]:
        sequences = self.encode.sequences(fields, place, is_whole=self.is_whole)
        if self.reports and self.is_whole and len(sequences[0]["input_ids"]) > self.encode.length:
            _report_cut_row(self.name, self.encode.length)
        return sequences


def _report_cut_rows(rows: Dataset, name: str, length: int) -> None:
    """Warn of chats and completions that packing cuts."""
    lengths = pc.list_value_length(rows.data.column("input_ids"))
    cut = pc.sum(pc.greater(lengths, length)).as_py()
    if cut and _is_first_rank():
        logger.warning(
            "%s of %s chats and completions in %s are longer than %s tokens (the longest has %s) and are cut at their "
            "end. Use a larger --length to train on all of them.",
            *(f"{cut:,}", f"{len(rows):,}", name, f"{length:,}", f"{pc.max(lengths).as_py():,}"),
        )


@functools.cache
def _report_cut_row(name: str, length: int) -> None:
    """Warn once of a stream."""
    if _is_first_rank():
        logger.warning(
            "A chat or completion in %s is longer than %s tokens and is cut at its end, and so are others as long. Use "
            "a larger --length to train on all of them.",
            *(name, f"{length:,}"),
        )


def _is_first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def padding_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Token id of padding: the tokenizer's if the model knows it, else 0."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None and pad < vocab_size else 0


class Collator:
    """Collator of packed rows into ``input_ids``, ``labels`` and ``position_ids``, all ``[B, T]``.

    The first token of a document is not predicted, so its label is ``IGNORED``. The padding at the end of a row is a
    document of its own, so no attention mask is needed.

    Args:
        length: Sequence length ``T``.
        pad: Token id of padding.
    """

    def __init__(self, length: int, pad: int):
        self.length = length
        self.pad = pad

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
