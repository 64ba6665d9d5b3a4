"""The text of an answer as it grows, and the strings at which it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are not a whole character yet."""


class Detokenizer:
    """Turns the new tokens of one request into text, and looks for its stop strings in what is new.

    Args:
        tokenizer: Of the model; None: there is no text, and no stop strings.
        stop: Strings at which to end.

    Attributes:
        text: All that has been said for certain. A stop string and what follows are left out, and so is the beginning
            of one until it is clear that it does not go on.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        self._tokens: list[int] = []
        self._whole = ""
        self._context, self._read = 0, 0  # tokens that are decoded again for their effect on the next, and tokens read

    def add(self, token: int) -> bool:
        """Take the next token; whether a stop string is complete with it."""
        if self.tokenizer is None:
            return False
        self._tokens.append(token)
        # How a token is written may depend on the ones before, so a few of those are decoded with it and cut off.
        before = self._decode(self._tokens[self._context : self._read])
        here = self._decode(self._tokens[self._context :])
        if len(here) <= len(before) or here.endswith(REPLACEMENT):
            return False
        searched = len(self._whole)
        self._whole += here[len(before) :]
        self._context, self._read = self._read, len(self._tokens)
        longest = max(map(len, self.stop), default=0)
        found = [self._whole.find(stop, max(0, searched - longest)) for stop in self.stop]
        if any(place >= 0 for place in found):
            self.text = self._whole[: min(place for place in found if place >= 0)]
            return True
        self.text = self._whole[: len(self._whole) - self._held_back()]
        return False

    def finish(self) -> None:
        """No more will come: what was held back was no stop string."""
        if self.tokenizer is not None and not any(stop in self._whole for stop in self.stop):
            self.text = self._decode(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _held_back(self) -> int:
        """How many of the last characters begin a stop string."""
        for count in range(max((len(stop) for stop in self.stop), default=0) - 1, 0, -1):
            if any(stop.startswith(self._whole[-count:]) for stop in self.stop if len(stop) > count):
                return count
        return 0
