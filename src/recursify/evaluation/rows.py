"""Rows of text files, for every command that reads text: plain text, JSON, JSONL, CSV, TSV and Parquet.

A field is its text as it is written, whatever other rows and files contain: nothing is converted to numbers, dates or
nulls. That is why files are not read with ``datasets``, whose readers infer types. Files are read as they are needed,
except for ``.json`` files and plain text, which are read whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from recursify.errors import TextError

PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".text")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of the files that are read from a folder. A file of another suffix is plain text, if it is given by name."""

Fields: TypeAlias = dict[str, Any]

csv.field_size_limit(2**31 - 1)  # documents are longer than the 128 KiB that csv allows by default


class Row(NamedTuple):
    """A row, and its place for error messages.

    Attributes:
        place: ``FILE:LINE``, where its first line is.
        fields: Values by name; a plain file has its ``text``.
    """

    place: str
    fields: Fields


def find_files(path: Path) -> list[Path]:
    """The file ``path``, or all text files under the folder ``path``.

    Raises:
        TextError: There is no such file, or no text file in the folder.
    """
    if not path.is_dir():
        if not path.exists():
            raise TextError(f"There is no text at '{path}'. Check the path.")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        raise TextError(f"'{path}' contains no text file ({', '.join(SUFFIXES)}). Give another folder.")
    return files


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file in order; an empty file has none.

    Raises:
        TextError: The file cannot be opened, is binary or not UTF-8, or is damaged; with the line.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
        elif suffix == ".jsonl":
            yield from _json_lines(file)
        elif suffix == ".json":
            yield from _json_rows(file)
        elif suffix in (".csv", ".tsv"):
            yield from _delimited_rows(file, "\t" if suffix == ".tsv" else ",")
        elif text := _read(file):
            yield Row(f"{file}:1", {"text": text})
    except OSError as error:
        raise TextError(f"'{file}' cannot be read: {error.strerror or error}. Check the file.") from error


# --- Lines -----------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[str]:
    """Lines as ``\\n`` ends them; U+2028 and other separators of Unicode are part of a line."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield _decode(line, file, number)


def _read(file: Path) -> str:
    return _decode(file.read_bytes(), file, 1)


def _decode(data: bytes, file: Path, number: int) -> str:
    """Text of ``data``, which begins at line ``number``, without a byte order mark at the beginning of the file."""
    if b"\0" in data:
        raise TextError(f"'{file}' is binary. Give plain text (UTF-8), JSONL, JSON, CSV, TSV or Parquet.")
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise TextError(
            f"{file}:{number} is not UTF-8 (byte 0x{data[error.start]:02x}). Convert the file first, for instance "
            f"with: iconv -t UTF-8"
        ) from error


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_lines(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(
                    f"{file}:{number} is not JSON ({_reason(error)}). Write one object per line."
                ) from error
            yield Row(f"{file}:{number}", _fields(value, line, f"{file}:{number}"))


def _json_rows(file: Path) -> Iterator[Row]:
    """Rows of an array, of one object, or of an object per line."""
    content = _read(file)
    if not content.strip():
        return
    decoder, end, line, counted = json.JSONDecoder(), _after_space(content, 0), 1, 0
    is_array = content[end] == "["
    end += is_array
    while (start := _after_space(content, end)) < len(content):
        line, counted = line + content.count("\n", counted, start), start
        if is_array and content[start] == "]":
            rest = _after_space(content, start + 1)
            if rest < len(content):
                number = line + content.count("\n", start, rest)
                raise TextError(f"{file}:{number} has text after the end of the array. Remove it.")
            return
        try:
            value, end = decoder.raw_decode(content, start)
        except (ValueError, RecursionError) as error:
            number = line + content.count("\n", start, getattr(error, "pos", start))
            raise TextError(f"{file}:{number} is not JSON ({_reason(error)}). Correct the file.") from error
        yield Row(f"{file}:{line}", _fields(value, content[start:end], f"{file}:{line}"))
        end = _after_space(content, end)
        if is_array and content[end : end + 1] == ",":
            end += 1
        elif is_array and content[end : end + 1] != "]":
            number = line + content.count("\n", counted, end)
            raise TextError(f"{file}:{number} is not JSON (expected ',' or ']' after a row). Correct the file.")
    if is_array:
        raise TextError(f"{file}:{line} is not JSON (the array does not end). Correct the file.")


def _reason(error: Exception) -> str:
    return f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)


def _after_space(content: str, start: int) -> int:
    """Index of the first character from ``start`` on that is not white space of JSON."""
    while start < len(content) and content[start] in " \t\r\n":
        start += 1
    return start


def _fields(value: Any, written: str, place: str) -> Fields:
    if "\\ud" in written.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{place} contains half of a surrogate pair (\\uD800 to \\uDFFF). Correct it.") from error
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, dict):
        return value
    raise TextError(f"{place} is {type(value).__name__}, not an object or a string. Write one object per row.")


# --- Tables ----------------------------------------------------------------------------------------------------------


def _delimited_rows(file: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; every value is a string."""
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise TextError(
                f"{file}:{number} is not {file.suffix[1:].upper()} ({error}). Correct the quotes."
            ) from error
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = values
            if len(set(header)) < len(header):
                raise TextError(f"{file}:{number} names a column twice ({', '.join(header)}). Rename one.")
        elif len(values) != len(header):
            raise TextError(
                f"{file}:{number} has {len(values)} fields, and the first line names {len(header)}. Quote fields that "
                f"contain the delimiter."
            )
        else:
            yield Row(f"{file}:{number}", dict(zip(header, values, strict=True)))


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{file}, row {number}", {name: without_nulls(value) for name, value in fields.items()})
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TextError(f"'{file}' cannot be read as Parquet: {error}. Write it again.") from error


def without_nulls(value: Any) -> Any:
    """``value`` without the null fields of nested objects, which Arrow adds where other rows have a field."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
