"""Offsets of tokens into the text, for the kinds of tokenizers: bytes, and words that begin with a space."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import byte_tokenizer
from recursify.server.logprobs import TextOffsets


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer of words with their space, and of bytes for the rest, as Llama 2 and Gemma have."""
    pieces = ["<unk>", "▁the", "▁cat", "s", "▁é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False)


def byte(value: int) -> str:
    return f"<0x{value:02X}>"


@pytest.mark.parametrize(
    ("pieces", "text", "offsets"),
    [
        (["▁the", "▁cat", "s"], "the cats", [0, 3, 7]),
        (["▁é", "s", "▁the"], "és the", [0, 1, 2]),
        (["▁cat", byte(0xE2), byte(0x82), byte(0xAC), "s"], "cat€s", [0, 3, 3, 3, 4]),
        (["▁cat", byte(0xE2), byte(0x82), "▁the"], "cat\ufffd\ufffd the", [0, 3, 3, 5]),
        (["▁the", byte(0xF0), byte(0x9F), byte(0x98), byte(0x80), "▁cat"], "the😀 cat", [0, 3, 3, 3, 3, 4]),
    ],
)
def test_words_with_spaces_and_bytes(pieces, text, offsets):
    """A token's own decoding lacks its space, so its length is not the distance to the next one."""
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert tokenizer.decode(ids) == text
    assert TextOffsets(tokenizer).advance(ids) == offsets
    counted, later = TextOffsets(tokenizer, 10), []
    for token in ids:  # as in a stream
        later += counted.advance([token])
    assert later == [10 + offset for offset in offsets]


def test_bytes():
    """Each byte of a character has its offset; the next character one more."""
    ids = byte_tokenizer()("a€b日", add_special_tokens=False)["input_ids"]
    assert TextOffsets(byte_tokenizer()).advance(ids) == [0, 1, 1, 1, 2, 3, 3, 3]
