"""Labels of completions and chats: the tokens that end behind the prompt, and the end that the tokenizer adds."""

from __future__ import annotations

import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import byte_tokenizer
from recursify.errors import TextError
from recursify.uptrain.data import padding_token, prepare_data
from recursify.uptrain.encoding import IGNORED, RowEncoder
from recursify.uptrain.settings import UptrainSettings

WORDS = ["two", "Ġand", "Ġtwo", "Ġis", "Ġfour", "four", ".ĊĊ", "ĊĊ"]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
CHAT_TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}{% if loud %}!{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or m.tool_calls[0].function.name }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": {"default": None}}}}]


def word_tokenizer(*, trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens are the longest of WORDS, as in Llama 3 (trimmed offsets) and Qwen (whole ones)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1}
    merges = []
    for piece in [*alphabet, *(word[:end] for word in WORDS for end in range(2, len(word) + 1))]:
        if piece not in vocabulary:
            vocabulary[piece] = len(vocabulary)
            merges += [(piece[:-1], piece[-1])] if len(piece) > 1 else []
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def learnt(tokenizer, row) -> list[str]:
    return [tokenizer.decode([token]) for token in row["labels"] if token != IGNORED]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("two and two", " is four", [" is", " four"]),
        ("two and two ", "is four", [" is", " four"]),
        ("two and two is ", "four", [" four"]),
        ("two and two is four.", "\n\nfour", [".\n\n", "four"]),
        ("two and two.\n\n", "four", ["four"]),
        ("two and two.\n", "\nfour", [".\n\n", "four"]),
        ("two", "\n", ["\n"]),
        ("", "two is", ["two", " is"]),
        ("two", "", []),
    ],
)
def test_tokens_that_end_behind_the_prompt(trim_offsets, prompt, completion, tokens):
    """Whether offsets leave out white space or not; the EOS that the tokenizer adds is learnt, BOS is not."""
    tokenizer = word_tokenizer(trim_offsets=trim_offsets)
    encode = RowEncoder(tokenizer, len(tokenizer), 64, completions_only=True)
    row = encode({"prompt": prompt, "completion": completion}, "row")
    assert row["input_ids"] == tokenizer(prompt + completion)["input_ids"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert learnt(tokenizer, row) == [*tokens, "</s>"]


def test_end_that_the_tokenizer_does_not_add():
    """Appended, and learnt."""
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer.eos_token = "<pad>"
    row = RowEncoder(tokenizer, 260, 64, completions_only=True)({"prompt": "a ", "completion": "b"}, "row")
    assert row["input_ids"] == [1, *tokenizer("a b", add_special_tokens=False)["input_ids"], 0]
    assert learnt(tokenizer, row) == ["b", "<pad>"]


@pytest.fixture
def chats():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("completions_only", [False, True])
def test_tools_and_arguments_of_the_template(chats, completions_only):
    """Both columns reach the template, as objects or as JSON; calls need no content; nulls of tools stay."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    encode = RowEncoder(chats, 260, 64, completions_only=completions_only)
    rows = [
        {"messages": [CHAT[0], call], "tools": TOOLS, "chat_template_kwargs": {"loud": True}},
        {"messages": [CHAT[0], call], "tools": json.dumps(TOOLS), "chat_template_kwargs": '{"loud": true}'},
        {"prompt": CHAT[:1], "completion": [call], "tools": TOOLS, "chat_template_kwargs": {"loud": True}},
    ]
    for fields in rows:
        row = encode(fields, "row")
        messages = [CHAT[0], {key: value for key, value in call.items() if value is not None}]
        expected = chats.apply_chat_template(messages, tools=TOOLS, loud=True, return_dict=True)["input_ids"]
        assert row["input_ids"] == expected
        assert chats.decode(expected) == "[add]!<user>hi;<assistant>add;"
        whole = "[add]!<user>hi;<assistant>add;"
        assert "".join(learnt(chats, row)) == ("add;" if completions_only else whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "[{"}, r"rows:3: 'tools' is not JSON"),
        ({"tools": {"a": 1}}, r"rows:3: 'tools' is dict, not list"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"rows:3: chat_template_kwargs: 'tokenize' is not a variable"),
    ],
)
def test_wrong_columns_of_a_chat(chats, fields, message):
    """Named, with the row."""
    with pytest.raises(TextError, match=message):
        RowEncoder(chats, 260, 64, completions_only=False)({"messages": CHAT, **fields}, "rows:3")


def test_assistant_turns_of_a_prompt_are_not_learnt(chats):
    """Of a conversational prompt/completion row the completion alone."""
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    encoded = RowEncoder(chats, 260, 64, completions_only=True)(row, "row")
    assert "".join(learnt(chats, encoded)) == "no;"
    encoded = RowEncoder(chats, 260, 64, completions_only=True)({"messages": CHAT}, "row")
    assert "".join(learnt(chats, encoded)) == "yes;no;"


def test_slow_tokenizers(chats, monkeypatch):
    """They have no offsets: everything can be learnt, completions alone cannot."""
    monkeypatch.setattr(type(chats), "is_fast", False)
    assert RowEncoder(chats, 260, 64, completions_only=False)({"prompt": "a", "completion": "b"}, "row")["labels"]
    with pytest.raises(TextError, match="completions_only needs a fast tokenizer"):
        RowEncoder(chats, 260, 64, completions_only=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_cut_chats_are_reported_once(tmp_path, chats, caplog, streaming):
    """With how many, and what to do; text that is split without loss is no reason."""
    long = [{"role": "user", "content": "why " * 20}, {"role": "assistant", "content": "so"}]
    rows = [{"messages": CHAT}] * 3 + [{"messages": long}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "b.txt").write_text("words " * 100, encoding="utf-8")
    data = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    settings = UptrainSettings(data=data, eval_data=data[1:], length=60, streaming=streaming)
    with caplog.at_level(logging.WARNING, "recursify"):
        list(prepare_data(settings, chats, 260).train)
    (record,) = caplog.records
    expected = "A chat or completion in " if streaming else "2 of 5 chats and completions in a.jsonl are longer than 60"
    assert record.getMessage().startswith(expected)
    assert "Use a larger --length" in record.getMessage()


def test_tokens_that_the_model_does_not_know(tmp_path, chats):
    """File and line, both sizes, before a model is trained; entries that no row uses do not matter."""
    chats.add_tokens([f"<unused{index}>" for index in range(40)])
    file = tmp_path / "a.jsonl"
    for text, is_known in (("plain", True), ("with <unused39>", False)):
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in ("one", text)), encoding="utf-8")
        settings = UptrainSettings(data=[str(file)], eval_data=[str(file)], length=8)
        if is_known:
            assert len(prepare_data(settings, chats, 260).train)
            continue
        with pytest.raises(TextError, match=r"a\.jsonl:2: The tokenizer has 298 entries, and token 297 \('<unused39>'"):
            prepare_data(settings, chats, 260)


def test_changed_files_and_templates_are_read_again(tmp_path, chats):
    """Prepared rows are found by contents and tokenizer, not by the name of the file."""
    file = tmp_path / "a.jsonl"
    settings = UptrainSettings(data=[str(file)], eval_data=[str(file)], length=64)
    found = []
    for text, template in (("one", CHAT_TEMPLATE), ("two", CHAT_TEMPLATE), ("two", "changed")):
        chats.chat_template = template
        file.write_text(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n", encoding="utf-8")
        found.append(chats.decode(prepare_data(settings, chats, 260).train[0]["input_ids"]))
    assert found == ["<user>one;", "<user>two;", "changed"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_a_long_text_begin_with_bos(tmp_path, streaming):
    """Each sequence of a split document begins as the tokenizer begins a text, and nothing is lost."""
    tokenizer = byte_tokenizer("<s> <pad> $A")
    text = "".join(chr(ord("a") + index % 26) for index in range(100))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    file = str(tmp_path / "long.txt")
    settings = UptrainSettings(data=[file], eval_data=[file], length=32, streaming=streaming)
    rows = list(prepare_data(settings, tokenizer, 260).train)
    assert sorted(len(row["input_ids"]) for row in rows) == [12, 32, 32, 32]
    assert all(row["input_ids"][:2] == [1, 0] and row["labels"][:2] == [IGNORED] * 2 for row in rows)
    parts = sorted((row["input_ids"][2:] for row in rows), key=len, reverse=True)
    assert sorted(token for part in parts for token in part) == sorted(tokenizer(text)["input_ids"][2:])


@pytest.mark.parametrize("first", ["chat", "text"])
def test_text_among_chats(tmp_path, chats, first):
    """A chat would be split, or text cut: refused with its line."""
    rows = {"chat": {"messages": CHAT}, "text": {"text": "plain"}}
    other = next(form for form in rows if form != first)
    lines = [json.dumps(rows[form]) + "\n" for form in (first, other)]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    harm = "chats or completions would be cut" if first == "chat" else "text would be split"
    with pytest.raises(TextError, match=rf"a\.jsonl:2: a row of the form '{other}' in a file of {harm}"):
        prepare_data(UptrainSettings(data=[str(tmp_path / "a.jsonl")], length=64), chats, 260)


def test_padding_outside_the_vocabulary():
    """A pad token that was added to the tokenizer alone is replaced."""
    tokenizer = byte_tokenizer()
    assert padding_token(tokenizer, 260) == 0
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert padding_token(tokenizer, 260) == 258
    assert padding_token(tokenizer, 258) == 0
