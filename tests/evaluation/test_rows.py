"""Rows of files: the same for every command, each field the text that is written."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from helpers.tiny_models import byte_tokenizer
from recursify.errors import TextError
from recursify.evaluation.rows import find_files, read_rows
from recursify.evaluation.text import read_text
from recursify.uptrain.data import prepare_data
from recursify.uptrain.settings import UptrainSettings

VALUES = ["2024-01-05", "007", "1.50", "TRUE", "None", "null", "NaN", "1e3", "a\u2028b\u2029c\x85d", " x ", "é漢𝄞"]
"""Texts that readers take for dates, numbers, booleans, nulls, or several lines."""


def write(folder, kind: str, values=VALUES):
    """A file of this kind with a row per value."""
    file = folder / f"rows.{kind}"
    rows = [{"text": value} for value in values]
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        pd.DataFrame(rows).to_csv(file, index=False, sep="\t" if kind == "tsv" else ",", lineterminator="\r\n")
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_a_field_is_its_text(tmp_path, kind):
    """Nothing is retyped, in any kind of file, by any command, read at once or streamed."""
    file = write(tmp_path, kind)
    assert [row.fields for row in read_rows(file)] == [{"text": value} for value in VALUES]
    assert read_text(file).documents == VALUES
    tokenizer = byte_tokenizer()
    for streaming in (False, True):
        settings = UptrainSettings(data=[str(file)], eval_data=[str(file)], length=64, streaming=streaming)
        packed = list(prepare_data(settings, tokenizer, 260).train)
        trained = [tokenizer.decode(ids) for row in packed for ids in documents_of(row)]
        assert sorted(trained) == sorted(VALUES)


def documents_of(row) -> list[list[int]]:
    """Token ids of each document in a packed row."""
    starts = [sum(row["seq_lengths"][:index]) for index in range(len(row["seq_lengths"]))]
    return [row["input_ids"][start : start + size] for start, size in zip(starts, row["seq_lengths"], strict=True)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_of_numbers_alone(tmp_path, kind):
    """Strings that are all digits stay strings, whatever other rows hold."""
    assert read_text(write(tmp_path, kind, ["1", "22", "333"])).documents == ["1", "22", "333"]


def test_fields_of_a_table_keep_quoted_lines(tmp_path):
    """Delimiters, quotes and line ends in quotes belong to the field, and line numbers go on counting them."""
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"one, ""two""\nthree",x\r\n\r\nfour,\r\n')
    rows = list(read_rows(tmp_path / "a.csv"))
    assert [row.fields for row in rows] == [{"text": 'one, "two"\nthree', "label": "x"}, {"text": "four", "label": ""}]
    assert [row.place.rpartition(":")[2] for row in rows] == ["2", "5"]
    long = "word " * 100_000
    (tmp_path / "long.csv").write_text(f"text\n{long}\n", encoding="utf-8")
    assert read_text(tmp_path / "long.csv").documents == [long]


def test_json_files(tmp_path):
    """An array, one object, an object per line, or strings; places are lines."""
    file = tmp_path / "a.json"
    for content, texts, lines in (
        ('[\n {"text": "a"},\n\n {"text": "b"}\n]\n', ["a", "b"], ["2", "4"]),
        ('{"text":\n "a"}', ["a"], ["1"]),
        ('{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"], ["1", "2"]),
        ('["a", "b"]', ["a", "b"], ["1", "1"]),
        ("[]", [], []),
        (" \n", [], []),
    ):
        file.write_bytes(content.encode("utf-8-sig"))
        rows = list(read_rows(file))
        assert [row.fields["text"] for row in rows] == texts
        assert [row.place.rpartition(":")[2] for row in rows] == lines


def test_forms_of_rows(tmp_path):
    """Every form of row that can be trained on can be measured on."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {"text": "plain", "id": 3},
        {"content": "other"},
        {"prompt": "two and", "completion": " two"},
        {"messages": chat},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"text": None, "messages": chat},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = ["plain", "other", "two and two", "hi\nyes", "hi\nyes", "hi\nyes"]
    assert read_text(tmp_path / "a.jsonl").documents == expected


def test_folders_and_suffixes(tmp_path):
    """Every kind of file in a folder, whatever the case of its suffix; another suffix only by name."""
    (tmp_path / "A.TXT").write_text("upper", encoding="utf-8")
    (tmp_path / "b.py").write_text("code", encoding="utf-8")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.tsv").write_text("text\ninside\n", encoding="utf-8")
    assert [file.name for file in find_files(tmp_path)] == ["A.TXT", "c.tsv"]
    assert read_text(tmp_path).documents == ["upper", "inside"]
    assert read_text(tmp_path / "b.py").documents == ["code"]


BROKEN = {
    "line.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"line\.jsonl:3 is not JSON \(column \d+: Expecting value\)"),
    "text.jsonl": (b'{"text": "a"}\nnot json\n', r"text\.jsonl:2 is not JSON .*Write one object per line"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", r"deep\.jsonl:1 is not JSON \(.*recursion"),
    "number.jsonl": (b'{"text": "a"}\n3\n', r"number\.jsonl:2 is int, not an object or a string"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', r"half\.jsonl:1 contains half of a surrogate pair"),
    "latin.jsonl": (
        '{"text": "a"}\n{"text": "Käse"}\n'.encode("latin-1"),
        r"latin\.jsonl:2 is not UTF-8 \(byte 0xe4\)",
    ),
    "latin.txt": ("a\nb\nKäse".encode("latin-1"), r"latin\.txt:3 is not UTF-8"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), r"wide\.jsonl' is binary|wide\.jsonl:1 is not UTF-8"),
    "open.json": (b'[\n{"text": "a"},\n{"text": "b"}\n', r"open\.json:\d is not JSON \(expected ',' or '\]'"),
    "comma.json": (b'[\n{"text": "a"},\n', r"comma\.json:\d is not JSON \(the array does not end\)"),
    "value.json": (b'[\n{"text": "a"},\n{"text": }\n]', r"value\.json:3 is not JSON \(column \d+: Expecting value\)"),
    "joined.json": (b'[\n{"text": "a"}\n{"text": "b"}]', r"joined\.json:3 is not JSON \(expected ',' or '\]'"),
    "rest.json": (b'[{"text": "a"}]\n[]', r"rest\.json:2 has text after the end of the array"),
    "fields.csv": (b"text,label\na,b\nc\n", r"fields\.csv:3 has 1 fields, and the first line names 2"),
    "more.csv": (b"text\na,b\n", r"more\.csv:2 has 2 fields, and the first line names 1"),
    "quote.csv": (b'text\na\n"b\nc\n', r"quote\.csv:3 is not CSV \(unexpected end of data\)"),
    "quote.tsv": (b'text\tlabel\n"a" b\tc\n', r"quote\.tsv:2 is not TSV \("),
    "twice.csv": (b"text,text\na,b\n", r"twice\.csv:1 names a column twice"),
    "broken.parquet": (b"PAR1 and no more", r"broken\.parquet' cannot be read as Parquet"),
    "image.png": (b"\x89PNG\r\n\x1a\n\0\0", r"image\.png' is binary"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_error(tmp_path, name):
    """File and line, the same in every command, and while a stream is read."""
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / name)
    file = str(tmp_path / name)
    (tmp_path / "good.txt").write_text("words " * 40, encoding="utf-8")
    for streaming in (False, True):
        settings = UptrainSettings(data=[file], eval_data=[str(tmp_path / "good.txt")], length=8, streaming=streaming)
        with pytest.raises(TextError, match=message):
            list(prepare_data(settings, byte_tokenizer(), 260).train)


def test_missing_files(tmp_path):
    """A path, an empty folder, a file without permission or a field."""
    with pytest.raises(TextError, match=r"no text at .*nowhere\.txt"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(TextError, match=r"contains no text file \(\.txt, .*\.tsv, \.parquet\)"):
        read_text(tmp_path)
    (tmp_path / "a.csv").write_text("body\nx\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"a\.csv:2 has no 'text' string .*it has: body"):
        read_text(tmp_path / "a.csv")
