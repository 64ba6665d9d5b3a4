"""Incremental detokenization, with stop strings.

``tokenizers.decoders.DecodeStream`` is not used: it needs a fast tokenizer, and raises on invalid UTF-8 of
byte-fallback tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoding of bytes that do not form a whole character yet."""


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Mapping from the ids of a tokenizer's special tokens to their texts."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return {token: str(text) for token, text in named} | {token: str(text) for token, text in added if text.special}


class Detokenizer:
    """Convert the tokens of one request to text, and search new text for stop strings.

    Without a tokenizer there are no text and no stop strings. Stop strings may contain special tokens, also where those
    are left out of the text.

    Args:
        tokenizer: Tokenizer of the tokens.
        stop: Stop strings.
        skip_special_tokens: Flag to leave special tokens out of the text.

    Attributes:
        text: Text that is certain. It excludes a stop string and everything after it, and a beginning of a stop string
            until it is clear that the rest does not follow.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.stop, self.skip_special_tokens = tokenizer, tuple(stop), skip_special_tokens
        self.text = ""
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # first token decoded again as context for new ones; number of decoded tokens
        # The text with those special tokens that stop strings contain, and where each of them begins and ends.
        self._searched, self._hidden = "", list[int]()
        self._hidden_tokens: Mapping[int, str] = {}
        self._has_stopped = False
        if self.stop and tokenizer is not None and skip_special_tokens:
            known = special_tokens(tokenizer).items()
            self._hidden_tokens = {token: text for token, text in known if any(text in stop for stop in self.stop)}

    def add(self, token: int, *, may_stop: bool = True) -> bool:
        """Add the next token; return whether it completes a stop string. With ``may_stop`` false it never does."""
        if self.tokenizer is None:
            return False
        piece, hidden, searched = self._decode_next(token), self._hidden_tokens.get(token, ""), len(self._searched)
        if not piece and not hidden:
            return False
        self._searched += piece + hidden
        if hidden:
            self._hidden += [len(self._searched) - len(hidden), len(self._searched)]
        matches = [self._searched.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        self._has_stopped = may_stop and any(start >= 0 for start in matches)
        end = len(self._searched) - self._num_withheld()
        self.text = self._visible(min(start for start in matches if start >= 0) if self._has_stopped else end)
        return self._has_stopped

    def finish(self) -> None:
        """Add withheld text after the last token, unless a stop string ended the text."""
        if self.tokenizer is not None and not self._has_stopped:
            self.text = self._decode(self._tokens)

    def _decode_next(self, token: int) -> str:
        """Text that a token adds; empty until its last character is whole."""
        self._tokens.append(token)
        # The text of a token may depend on the tokens before it, so a few of them are decoded with it and cut off.
        context = self._decode(self._tokens[self._context : self._read])
        extended = self._decode(self._tokens[self._context :])
        if len(extended) <= len(context) or extended.endswith(REPLACEMENT):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return extended[len(context) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special_tokens)

    def _visible(self, end: int) -> str:
        """Text before position ``end`` of the searched text."""
        bounds = [0, *self._hidden, end]
        spans = zip(bounds[::2], bounds[1::2], strict=True)
        return "".join(self._searched[start : min(stop, end)] for start, stop in spans)

    def _num_withheld(self) -> int:
        """Number of final characters of the searched text that begin a stop string."""
        for count in range(max((len(stop) for stop in self.stop), default=0) - 1, 0, -1):
            if any(stop.startswith(self._searched[-count:]) for stop in self.stop if len(stop) > count):
                return count
        return 0
