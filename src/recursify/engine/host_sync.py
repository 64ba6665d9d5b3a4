"""Device-to-host copies. Each one synchronizes with the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostSync:
    """Copies exit decisions at once, and sampled tokens together with the next decisions.

    Attributes:
        count: Number of copies.
    """

    def __init__(self) -> None:
        self.count = 0
        self._pending: Tensor | None = None
        self._fetched: list[int] = []

    @property
    def pending(self) -> Tensor | None:
        """Deferred tokens that have not been copied yet, ``[n]``."""
        return self._pending

    def defer(self, tokens: Tensor) -> None:
        """Copy ``tokens [n]`` with the next :meth:`fetch`."""
        assert self._pending is None
        self._pending = tokens

    def fetch(self, decisions: Tensor) -> list[bool]:
        """Copy ``decisions``, bool ``[n]``, and the deferred tokens in one transfer."""
        self.count += 1
        if self._pending is None:
            return decisions.tolist()
        numbers = torch.cat([decisions.to(self._pending.dtype), self._pending]).tolist()
        self._fetched, self._pending = numbers[len(decisions) :], None
        return [number != 0 for number in numbers[: len(decisions)]]

    def fetch_tokens(self) -> list[int]:
        """Return the deferred tokens, with a copy of their own unless the last :meth:`fetch` took them."""
        if self._pending is not None:
            self.count += 1
            self._fetched, self._pending = self._pending.tolist(), None
        tokens, self._fetched = self._fetched, []
        return tokens
