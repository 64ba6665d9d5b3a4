"""Data: forms of rows, packing, masks, and what is said of rows that are wrong."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from datasets import Dataset, load_dataset

from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny
from recursify.errors import TextError
from recursify.modeling import RecursiveForCausalLM
from recursify.uptrain.data import IGNORED, Collator, prepare_data
from recursify.uptrain.settings import UptrainSettings

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def prepare(tokenizer, *data, **settings):
    chosen = {"length": 32, "data": data, "eval_data": data, **settings}
    return prepare_data(UptrainSettings(**chosen), tokenizer, 260)


def learnt(tokenizer, row) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != IGNORED])


def test_every_form_of_file(tmp_path, tokenizer):
    """Text, JSONL, Parquet and CSV, alone and as a folder: the same rows."""
    texts = [f"document number {index}" for index in range(6)]
    rows = [{"text": text} for text in texts]
    (tmp_path / "all").mkdir()
    write_rows(tmp_path / "all" / "a.jsonl", rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "all" / "b.parquet")
    pd.DataFrame(rows).to_csv(tmp_path / "all" / "c.csv", index=False)
    for index, text in enumerate(texts):
        (tmp_path / "all" / f"{index}.md").write_text(text, encoding="utf-8")
    expected = sorted("".join(texts))
    for name in ("a.jsonl", "b.parquet", "c.csv"):
        found = prepare(tokenizer, str(tmp_path / "all" / name))
        assert sorted("".join(tokenizer.decode(row["input_ids"]) for row in found.train)) == expected
    together = prepare(tokenizer, str(tmp_path / "all"))
    assert sorted("".join(tokenizer.decode(row["input_ids"]) for row in together.train)) == sorted(4 * expected)


def test_long_text_is_split_and_nothing_is_lost(tmp_path, tokenizer):
    """A document of 100 tokens fills four sequences of 32, in order."""
    text = "".join(chr(ord("a") + index % 26) for index in range(100))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    rows = prepare(tokenizer, str(tmp_path / "long.txt")).evaluation
    assert sorted(len(row["input_ids"]) for row in rows) == [4, 32, 32, 32]
    assert sorted("".join(tokenizer.decode(row["input_ids"]) for row in rows)) == sorted(text)


def test_order_is_that_of_the_seed(tmp_path, tokenizer):
    """The same seed, the same order; another seed, another; and not the file's own."""
    file = write_rows(tmp_path / "a.jsonl", [{"text": f"{index:030d}"} for index in range(40)])
    first, again, other = (prepare(tokenizer, file, seed=seed).train["input_ids"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != sorted(first)


def test_streams_give_the_same_rows(tmp_path, tokenizer):
    """Reading as needed packs what preparing everything packs."""
    file = write_rows(tmp_path / "a.jsonl", [{"text": f"{index:020d}"} for index in range(40)])
    stream = prepare(tokenizer, file, streaming=True).train
    ids = sorted(row["input_ids"] for row in stream)
    assert ids == sorted(prepare(tokenizer, file).train["input_ids"][:])


def test_completions_only(tmp_path, tokenizer):
    """Of prompt and completion the completion, of a chat what the assistant says; else all of it."""
    pairs = write_rows(tmp_path / "p.jsonl", [{"prompt": "two and two", "completion": " is four"}])
    row = prepare(tokenizer, pairs, completions_only=True).evaluation[0]
    assert learnt(tokenizer, row) == " is four"
    assert learnt(tokenizer, prepare(tokenizer, pairs).evaluation[0]) == "two and two is four"
    chats = write_rows(tmp_path / "c.jsonl", [{"messages": CHAT}])
    row = prepare(tokenizer, chats, completions_only=True, length=64).evaluation[0]
    assert tokenizer.decode(row["input_ids"]) == "<user>hi;<assistant>yes;<user>more;<assistant>no;"
    assert learnt(tokenizer, row) == "yes;no;"


def test_nothing_to_learn(tmp_path, tokenizer):
    """Chats in which the assistant says nothing, or not within the length: no run that reports perplexity 1."""
    silent = write_rows(tmp_path / "silent.jsonl", [{"messages": CHAT[:1]}] * 4)
    late = write_rows(tmp_path / "late.jsonl", [{"prompt": "why " * 40, "completion": "so"}] * 4)
    for file in (silent, late):
        with pytest.raises(TextError, match=r"held-out rows of .* have no tokens to learn: no completion"):
            prepare(tokenizer, file, completions_only=True)


def test_first_token_of_a_document_is_not_predicted():
    """Position ids restart, and what cannot be predicted from its own document has no label."""
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}
    batch = Collator(8, pad=0)([row])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(tmp_path, family, attention):
    """Each document's logits are those that it has alone."""
    save_tiny(tmp_path / "dense", family)
    convert_tiny(tmp_path / "dense", tmp_path / "out", lora_rank=2)
    model = RecursiveForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=attention).eval()
    documents = [list(range(10, 10 + length)) for length in (5, 11, 3)]
    ids = [token for document in documents for token in document]
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [5, 11, 3]}
    batch = Collator(24, pad=0)([row, row])
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        start = 0
        for document in documents:
            alone = model(torch.tensor([document]), use_cache=False).logits[0]
            for line in packed:
                torch.testing.assert_close(line[start : start + len(document)], alone, atol=2e-5, rtol=1e-4)
            start += len(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"text": 3}\n', r"rows\.jsonl:2: 'text' is int, not a string"),
        ('{"text": "fine"}\n\n{"text": \n', r"rows\.jsonl:3 is not JSON"),
        ('{"body": "fine"}\n', r"has the fields body\. Give rows with 'text', with 'prompt' and 'completion'"),
        ('{"prompt": "a", "completion": null}\n', r"rows\.jsonl:1: 'completion' is NoneType, not a string"),
        ('{"messages": [{"role": "user"}]}\n', r"rows\.jsonl:1: a message has no string 'content'"),
        ("", r"empty\. Give files"),
    ],
)
def test_wrong_rows_are_named(tmp_path, tokenizer, content, message):
    """File, line and field."""
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=message):
        prepare(tokenizer, str(tmp_path / "rows.jsonl"))


def test_unreadable_files_are_named(tmp_path, tokenizer):
    """Missing, not UTF-8, of another kind, or a folder without text."""
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "none").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, message in (
        ("nowhere.jsonl", "no text at"),
        ("latin.txt", "not UTF-8"),
        ("image.png", "is not UTF-8"),
        ("none", "contains no text file"),
        ("broken.parquet", "cannot be read"),
    ):
        with pytest.raises(TextError, match=message):
            prepare(tokenizer, str(tmp_path / name))


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_data_sets_of_the_hub(tmp_path, tokenizer, monkeypatch, streaming):
    """One error, whether the first or a later row is damaged; ``datasets`` raises pyarrow's."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' * 200 + '{"text": \n', encoding="utf-8")

    def load(name, split, streaming):
        return load_dataset("json", data_files=str(file), split=split, streaming=streaming)

    monkeypatch.setattr("recursify.uptrain.data.load_dataset", load)
    with pytest.raises(TextError, match=r"'me/data' cannot be read: JSON parse error.*download them and give them by"):
        prepare(tokenizer, "me/data", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_the_hub_are_encoded_alike(tmp_path, tokenizer, monkeypatch, streaming):
    """Rows of ``datasets``, whose nested objects have nulls for the fields of other rows."""
    tools = [{"type": "function", "function": {"name": name, "parameters": {name: 1}}} for name in "ab"]
    rows = [{"messages": CHAT, "tools": [tool]} for tool in tools]
    monkeypatch.setattr(
        "recursify.uptrain.data.load_dataset",
        lambda *_, streaming, **__: (
            Dataset.from_list(rows).to_iterable_dataset() if streaming else Dataset.from_list(rows)
        ),
    )
    tokenizer.chat_template = "{{ tools | tojson }}" + CHAT_TEMPLATE
    found = list(prepare(tokenizer, "me/data", streaming=streaming, length=256).train)
    file = write_rows(tmp_path / "a.jsonl", rows)
    expected = list(prepare(tokenizer, file, length=256).train)
    assert sorted(row["input_ids"] for row in found) == sorted(row["input_ids"] for row in expected)


def test_chats_need_a_template(tmp_path):
    """The message says what else there is."""
    file = write_rows(tmp_path / "c.jsonl", [{"messages": CHAT}])
    with pytest.raises(TextError, match="has no chat template"):
        prepare(byte_tokenizer(), file)


def test_too_little_text(tmp_path, tokenizer):
    """One sequence cannot be both trained on and held out."""
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    with pytest.raises(TextError, match="fills 1 sequences of 32 tokens, but at least 2 are needed"):
        prepare(tokenizer, str(tmp_path / "short.txt"), eval_data=None)
    with pytest.raises(TextError, match="is streamed, so no part of it can be held out"):
        prepare(tokenizer, str(tmp_path / "short.txt"), eval_data=None, streaming=True)
