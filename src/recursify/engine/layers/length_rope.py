"""RoPE that depends on the length of a sequence, for rows of sequences of different lengths.

A row is rotated as transformers' ``generate`` rotates its token when the request runs alone. There a prompt is rotated
by its own length and a new token by the length up to it, and keys in the cache stay as they are; except in families
that drop the cache where other frequencies begin (Phi-3), and compute everything again. So does the engine then
(``Scheduler._start_again``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from recursify.modeling.recursive_rope import at_length, length_limits, rope_key

MAX_MODULES = 64
"""Number of modules to keep; ``dynamic`` RoPE has one for every length beyond its limit."""


class LengthRope:
    """RoPE modules of a model by length.

    Attributes:
        rotary: The model's own module.
        starts_again: True in families that compute all keys again where other frequencies begin.
    """

    def __init__(self, rotary: Any, *, starts_again: bool) -> None:
        self.rotary, self.starts_again = rotary, starts_again
        self._modules: dict[tuple[int, ...], nn.Module] = {}

    def key(self, length: int) -> tuple[int, ...]:
        """Key of the frequencies at ``length``."""
        return rope_key(self.rotary, length)

    def at(self, length: int) -> nn.Module:
        """Module with the frequencies of ``length``."""
        key = self.key(length)
        if key not in self._modules:
            if len(self._modules) == MAX_MODULES:
                del self._modules[next(iter(self._modules))]
            self._modules[key] = at_length(self.rotary, length)
        return self._modules[key]

    def lengths(self, spans: Sequence[Any]) -> list[int]:
        """Length by which each row of ``spans`` (:class:`~.batch.TokenSpan`) is rotated."""
        if self.starts_again:
            return [span.request.rope_length for span in spans for _ in span.positions]
        return [max(span.request.rope_length, position + 1) for span in spans for position in span.positions]

    def prefix_seed(self, request: Any) -> bytes:
        """Part of the keys of a request's cached pages: other frequencies are other keys and values."""
        return repr(self.key(request.rope_length)).encode()

    def num_alike(self, request: Any) -> int:
        """Number of a request's tokens, from the first, whose keys have the frequencies of its prompt."""
        count = len(request.tokens)
        if self.starts_again or self.key(count) == self.key(request.rope_length):
            return count
        limits = [limit for _, limit in length_limits(self.rotary)]
        return max(request.rope_length, min(limits))
