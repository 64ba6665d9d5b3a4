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
