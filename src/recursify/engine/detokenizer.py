"""Incremental detokenization, with stop strings.

``tokenizers.decoders.DecodeStream`` is not used: it needs a fast tokenizer, and raises on invalid UTF-8 of
byte-fallback tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoding of bytes that do not form a whole character yet."""


class Detokenizer:
    """Convert the tokens of one request to text, and search new text for stop strings.

    Without a tokenizer there are no text and no stop strings.

    Attributes:
        text: Text that is certain. It excludes a stop string and everything after it, and a beginning of a stop string
            until it is clear that the rest does not follow.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""
        self._tokens: list[int] = []
        self._decoded = ""
        self._context, self._read = 0, 0  # first token decoded again as context for new ones; number of decoded tokens

    def add(self, token: int) -> bool:
        """Add the next token; return whether it completes a stop string."""
        if self.tokenizer is None:
            return False
        self._tokens.append(token)
        # The text of a token may depend on the tokens before it, so a few of them are decoded with it and cut off.
        context = self._decode(self._tokens[self._context : self._read])
        extended = self._decode(self._tokens[self._context :])
        if len(extended) <= len(context) or extended.endswith(REPLACEMENT):
            return False
        searched = len(self._decoded)
        self._decoded += extended[len(context) :]
        self._context, self._read = self._read, len(self._tokens)
        longest = max(map(len, self.stop), default=0)
        matches = [self._decoded.find(stop, max(0, searched - longest)) for stop in self.stop]
        if any(start >= 0 for start in matches):
            self.text = self._decoded[: min(start for start in matches if start >= 0)]
            return True
        self.text = self._decoded[: len(self._decoded) - self._num_withheld()]
        return False

    def finish(self) -> None:
        """Add withheld text after the last token, unless a stop string ended the text."""
        if self.tokenizer is not None and not any(stop in self._decoded for stop in self.stop):
            self.text = self._decode(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _num_withheld(self) -> int:
        """Number of final characters that begin a stop string."""
        for count in range(max((len(stop) for stop in self.stop), default=0) - 1, 0, -1):
            if any(stop.startswith(self._decoded[-count:]) for stop in self.stop if len(stop) > count):
                return count
        return 0
