"""Text as it grows: whole characters, held-back beginnings of stop strings, and ends."""

import pytest

from helpers.tiny_models import byte_tokenizer
from recursify.engine.detokenizer import Detokenizer


def say(checker: Detokenizer, text: str) -> list[str]:
    """The text after each token, up to a stop."""
    seen = []
    for token in byte_tokenizer()(text, add_special_tokens=False)["input_ids"]:
        stops = checker.add(token)
        seen.append(checker.text)
        if stops:
            break
    return seen


def test_characters_are_whole():
    """A character of several bytes appears when its last one has come."""
    seen = say(Detokenizer(byte_tokenizer(), ()), "aé€b")
    assert seen == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"]


def test_beginnings_of_stop_strings_are_held_back():
    checker = Detokenizer(byte_tokenizer(), ("<end>", "!!"))
    assert say(checker, "a<en!b") == ["a", "a", "a", "a", "a<en", "a<en!b"]
    checker.finish()
    assert checker.text == "a<en!b"


def test_what_was_held_back_comes_at_the_end():
    checker = Detokenizer(byte_tokenizer(), ("<end>",))
    say(checker, "a<en")
    assert checker.text == "a"
    checker.finish()
    assert checker.text == "a<en"


@pytest.mark.parametrize(
    ("text", "stop", "expected"), [("one<end>two", ("<end>",), "one"), ("abab!", ("bab", "ab!"), "a")]
)
def test_stop_strings_are_cut_off(text, stop, expected):
    checker = Detokenizer(byte_tokenizer(), stop)
    say(checker, text)
    assert checker.text == expected
    checker.finish()
    assert checker.text == expected


def ids_of(*parts: str | int) -> list[int]:
    """Tokens of texts, and ids as they are."""
    encode = byte_tokenizer()
    found = [[part] if isinstance(part, int) else encode(part, add_special_tokens=False)["input_ids"] for part in parts]
    return [token for ids in found for token in ids]


def text_of(checker: Detokenizer, *parts: str | int) -> tuple[list[str], bool]:
    """The text after each token, up to a stop, and whether there was one."""
    seen = []
    for token in ids_of(*parts):
        stops = checker.add(token)
        seen.append(checker.text)
        if stops:
            checker.finish()
            assert checker.text == seen[-1]
            return seen, True
    checker.finish()
    return seen, False


PAD, BOS = 0, 1  # "<pad>" and "<s>", special tokens of the byte tokenizer


@pytest.mark.parametrize(
    ("stop", "parts", "expected"),
    [
        (("<s>",), ("ab", BOS, "c"), "ab"),
        (("<s>",), ("ab", PAD, "c", BOS, "d"), "abc"),
        (("b<s>",), ("ab", BOS), "a"),
        (("<s>!",), ("é", BOS, "!"), "é"),
        (("<s><pad>",), ("a", BOS, "b", BOS, PAD), "ab"),
        (("<s>",), ("a<s>b",), "a"),  # written with other tokens
        (("never", "bc"), ("ab", PAD, "cd"), "a"),
    ],
)
def test_special_tokens_in_stop_strings_end_the_text(stop, parts, expected):
    """Also where the text leaves them out; nothing of a stop string is shown before it is complete."""
    seen, stopped = text_of(Detokenizer(byte_tokenizer(), stop), *parts)
    assert stopped
    assert seen[-1] == expected
    assert all(expected.startswith(text) for text in seen)


def test_what_begins_like_a_special_stop_is_given_back():
    checker = Detokenizer(byte_tokenizer(), ("b<s>!",))
    seen, stopped = text_of(checker, "ab", BOS, "cb")
    assert not stopped
    assert seen == ["a", "a", "a", "abc", "abc"]
    assert checker.text == "abcb"


def test_special_tokens_are_shown_on_request():
    checker = Detokenizer(byte_tokenizer(), ("<s>!",), skip_special_tokens=False)
    seen, stopped = text_of(checker, "a", PAD, BOS, "b")
    assert (seen[-1], stopped) == ("a<pad><s>b", False)
