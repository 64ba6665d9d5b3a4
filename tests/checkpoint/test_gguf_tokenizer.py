"""The tokenizer of a ``.gguf`` comes from that file alone, and splits text as llama.cpp does.

Expected pieces and ids were compared with llama.cpp (llama-cpp-python 0.3.36) on SmolLM2's vocabulary and on a
SentencePiece vocabulary.
"""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from helpers.gguf_files import TEMPLATE, byte_level_keys, sentencepiece_keys, write_gguf
from helpers.tiny_models import byte_tokenizer, tiny_dense
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
from recursify.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS
from recursify.checkpoint.loading import load_model
from recursify.convert.pipeline import convert_model
from recursify.errors import CheckpointError, UnsupportedModelError

TEXT = "I'LL  pay 12345.50 (see c1):\n\n don't/été   HTTPServer\n"
PIECES = {
    "gpt-2 phi-2 olmo mpt jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling": (
        "I|'|LL| | pay| 12345|.|50| (|see| c|1|):|\n\n| don|'t|/|été|  | HTTPServer|\n"
    ),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (
        "I|'|LL| | pay| |1|2|3|4|5|.|5|0| (|see| c|1|):|\n\n| don|'t|/|été|  | HTTPServer|\n"
    ),
    "llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0 dbrx smaug-bpe": (
        "I|'LL| | pay| |123|45|.|50| (|see| c|1|):\n\n| don|'t|/été|  | HTTPServer|\n"
    ),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 tekken": (
        "I|'LL| | pay| |1|2|3|4|5|.|5|0| (|see| c|1|):\n\n| don|'t|/été|  | HTTPServer|\n"
    ),
    "seed-coder": "I|'LL| | pay| |1|2|3|4|5|.|5|0| (|see| c|1|):|\n\n| don|'t|/été|  | HTTPServer|\n",
    "gpt-4o llama4 kanana2": "I'LL| | pay| |123|45|.|50| (|see| c|1|):\n\n| don't|/été|  | HTTPServer|\n",
    "falcon default": "I|'|LL| | pay| |123|45|.|50| |(|see| c|1|):|\n\n| don|'|t|/|été|  | HTTPServer|\n",
    "deepseek-coder": "I|'|LL| | pay| |1|2|3|4|5|.|5|0| (|see| c|1|):|\n|\n| don|'|t|/|été|  | HTTPServer|\n",
}
PIECES_BY_NAME = {name: pieces.split("|") for names, pieces in PIECES.items() for name in names.split()}


def write(folder, tokenizer, **options):
    model = tiny_dense("llama", vocab_size=len(tokenizer["tokenizer.ggml.tokens"]))
    return write_gguf(folder / "model.gguf", model, tokenizer=tokenizer, **options)


def tokenizer_of(folder, tokenizer, **options):
    return load_tokenizer(open_checkpoint(write(folder, tokenizer, **options)))


def tokens(tokenizer, text, **options):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options)["input_ids"])


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pieces_of_every_pre_tokenizer(name):
    """As llama.cpp splits them: digits, contractions, punctuation, line ends and runs of spaces."""
    pieces = PRE_TOKENIZERS[name].build().pre_tokenize_str(TEXT)
    assert [TEXT[first:last] for _, (first, last) in pieces] == PIECES_BY_NAME[name]


def test_digits_are_split_before_merging(tmp_path):
    """``Ġ1`` is a token, and SmolLM2 never makes it; transformers 5.17 and 5.24 split its text as GPT-2's."""
    assert tokens(tokenizer_of(tmp_path, byte_level_keys("smollm")), "a  1 he") == [*"aĠĠ1Ġ", "he"]
    assert tokens(tokenizer_of(tmp_path, byte_level_keys("gpt-2")), "a  1 he") == [*"aĠ", "Ġ1", "Ġ", "he"]


def test_unknown_pre_tokenizer(tmp_path):
    """Refused by name when the file is opened."""
    with pytest.raises(UnsupportedModelError, match=r"pre-tokenizer 'tomorrow' \(tokenizer.ggml.pre\).*smollm"):
        open_checkpoint(write(tmp_path, byte_level_keys("tomorrow")))


def test_whole_pieces_that_are_tokens(tmp_path):
    """Llama 3 takes a piece that is a token as it is, though no merge leads there."""
    keys = byte_level_keys("llama-bpe")
    keys["tokenizer.ggml.tokens"][259] = "the"
    keys["tokenizer.ggml.merges"] = ["h e"]
    assert tokens(tokenizer_of(tmp_path, keys), "the", add_special_tokens=False) == ["the"]
    keys["tokenizer.ggml.pre"] = "smaug-bpe"
    assert tokens(tokenizer_of(tmp_path, keys), "the", add_special_tokens=False) == ["t", "he"]


@pytest.mark.parametrize(
    ("pre", "keys", "expected"),
    [
        ("smollm", {}, ["he"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "he"]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "he", "<pad>"]),
        ("llama-bpe", {}, ["<s>", "he"]),
        ("llama-bpe", {"add_bos_token": False}, ["he"]),
    ],
)
def test_bos_and_eos(tmp_path, pre, keys, expected):
    """Added as the file says, else as llama.cpp does for this pre-tokenizer; after saving as well."""
    tokenizer = tokenizer_of(tmp_path, byte_level_keys(pre, **keys))
    assert tokens(tokenizer, "he") == expected
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokens(AutoTokenizer.from_pretrained(tmp_path / "saved"), "he") == expected


def test_special_and_user_defined_tokens(tmp_path):
    """Found whole in the text; control tokens are special, those of a user are not."""
    tokenizer = tokenizer_of(tmp_path, byte_level_keys())
    ids = tokenizer("<s>he<think>he")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "he", "<think>", "he"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<think>he"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<pad>", "<pad>")


@pytest.mark.parametrize("family", ["qwen2", "gemma", "phi3"])
def test_no_token_beyond_the_vocabulary(tmp_path, family):
    """transformers 5.17 adds Qwen's and Phi's special tokens to every file of their architecture."""
    keys = byte_level_keys("qwen2")
    model = tiny_dense(family, vocab_size=261)
    tokenizer = load_tokenizer(open_checkpoint(write_gguf(tmp_path / "model.gguf", model, tokenizer=keys)))
    assert len(tokenizer) == 261
    assert [tokenizer.convert_ids_to_tokens(index) for index in range(261)] == keys["tokenizer.ggml.tokens"]


def test_files_beside_are_not_read(tmp_path):
    """Another model's tokenizer, chat template and generation config lie in the same folder."""
    other = byte_tokenizer()
    other.chat_template = "{{ 'other' }}"
    other.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=77, temperature=0.5, do_sample=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    convert_model(write(tmp_path, byte_level_keys(eot_token_id=1)), tmp_path / "out", check=False, lora_rank=2)
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.chat_template == TEMPLATE
    assert tokens(written, "a  1<think>he") == [*"aĠĠ1", "<think>", "he"]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [0, 1]
    assert (generation.bos_token_id, generation.pad_token_id, generation.do_sample) == (1, 0, None)


def test_generation_config(tmp_path):
    """The ends of a text and of a turn, and the sampling that the author of the model gave, loaded and converted."""
    keys = {"general.sampling.temp": 0.7, "general.sampling.top_k": 40, "general.sampling.penalty_repeat": 1.1}
    file = write(tmp_path, byte_level_keys(eot_token_id=1), keys=keys)
    model, _ = load_model(file)
    convert_model(file, tmp_path / "out", check=False, calibration_data=[])
    for config in (model.generation_config, GenerationConfig.from_pretrained(tmp_path / "out")):
        assert config.eos_token_id == [0, 1]
        assert (config.do_sample, config.temperature, config.top_k) == (True, 0.7, 40)
        assert config.repetition_penalty == 1.1


@pytest.mark.parametrize("keys", [{}, {"general.sampling.temp": 0.0, "general.sampling.top_p": 0.9}])
def test_generation_config_that_does_not_sample(tmp_path, keys):
    """Greedy, and saved without complaint."""
    model = open_checkpoint(write(tmp_path, byte_level_keys(), keys=keys)).load_model()
    model.generation_config.save_pretrained(tmp_path / "saved")
    assert (model.generation_config.do_sample, model.generation_config.eos_token_id) == (None, 0)


def test_named_chat_templates(tmp_path):
    """The default one and the others."""
    keys = byte_level_keys() | {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ 1 }}"}
    assert tokenizer_of(tmp_path, keys).chat_template == {"default": TEMPLATE, "tool_use": "{{ 1 }}"}


def test_file_without_a_tokenizer(tmp_path):
    """Converted without text."""
    model = tiny_dense("llama")
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer={"tokenizer.ggml.model": "no_vocab"})
    result = convert_model(file, tmp_path / "out", lora_rank=2)
    assert result.check.text.startswith("random tokens")
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", ["<s>", "▁ab"]),  # scored best
        ("abc", ["<s>", "▁a", "bc"]),  # "bc" is merged before "ab"
        ("a<turn>b  ab", ["<s>", "▁a", "<turn>", "▁", "b", "  ", "▁ab"]),
        ("b é", ["<s>", "▁", "b", "▁", "<0xC3>", "<0xA9>"]),
    ],
)
def test_sentencepiece(tmp_path, text, expected):
    """Merges by score, bytes of what is no token, a space in front of every piece of text."""
    tokenizer = tokenizer_of(tmp_path, sentencepiece_keys())
    assert tokens(tokenizer, text) == expected


def test_sentencepiece_without_a_prefix(tmp_path):
    """As in Gemma."""
    tokenizer = tokenizer_of(tmp_path, sentencepiece_keys(add_space_prefix=False, add_bos_token=False))
    assert tokens(tokenizer, "ab  a<turn>") == ["ab", "  ", "a", "<turn>"]
    assert tokenizer.decode(tokenizer("ab é\tc")["input_ids"]) == "ab é\tc"
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")


def test_tokens_of_phi3_swallow_the_space_behind_them(tmp_path):
    """Which no key says; llama.cpp goes by the name too."""
    keys = sentencepiece_keys()
    assert tokens(tokenizer_of(tmp_path, keys), "<turn> a<s> b") == ["<s>", "<turn>", "▁", "▁a", "<s>", "▁", "▁", "b"]
    tokenizer = tokenizer_of(tmp_path, keys, keys={"general.name": "Phi-3 Mini"})
    assert tokens(tokenizer, "<turn> a<s> b") == ["<s>", "<turn>", "▁a", "<s>", "▁", "▁", "b"]


def test_sentencepiece_with_neither_scores_nor_merges(tmp_path):
    """The order of merges is lost."""
    keys = sentencepiece_keys(scores=[-1000.0] * 269)
    with pytest.raises(CheckpointError, match="without scores or merges, so the order of its merges is lost"):
        tokenizer_of(tmp_path, keys)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"model": "bert"}, r"a tokenizer of the kind 'bert' \(tokenizer.ggml.model\).*: gpt2, llama"),
        ({"add_sep_token": True}, r"has tokenizer.ggml.add_sep_token, which is not supported"),
    ],
)
def test_unsupported_tokenizer(tmp_path, keys, match):
    """Refused when the file is opened."""
    with pytest.raises(UnsupportedModelError, match=match):
        open_checkpoint(write(tmp_path, byte_level_keys(**keys)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda keys: keys["tokenizer.ggml.tokens"].__setitem__(5, "he"), "has a token twice, 'he'"),
        (lambda keys: keys["tokenizer.ggml.token_type"].pop(), r"has \d+ tokens, and kinds of \d+"),
        (lambda keys: keys.pop("tokenizer.ggml.merges"), "byte-level tokenizer without merges"),
        (lambda keys: keys["tokenizer.ggml.merges"].append("x yz"), "is damaged: .*Token `yz` out of vocabulary"),
    ],
)
def test_damaged_vocabulary(tmp_path, change, match):
    """Named."""
    keys = byte_level_keys()
    change(keys)
    with pytest.raises(CheckpointError, match=match):
        tokenizer_of(tmp_path, keys)


def test_more_tokens_than_the_model_has(tmp_path):
    """One message, whatever reads the tokenizer."""
    file = write_gguf(tmp_path / "model.gguf", tiny_dense("llama"), tokenizer=byte_level_keys())
    with pytest.raises(CheckpointError, match="261 tokens, but an embedding for 260"):
        load_tokenizer(open_checkpoint(file))
