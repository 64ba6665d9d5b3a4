"""Bringing numbers from the device. Each time the host waits until the device has done all that it was given."""

from __future__ import annotations

import torch
from torch import Tensor


class HostSync:
    """Fetches decisions when they are needed, and tokens with the next decisions.

    Attributes:
        count: How often the host has waited.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting: Tensor | None = None
        self._brought: list[int] = []

    @property
    def pending(self) -> Tensor | None:
        """Tokens that have not been fetched yet, ``[n]``."""
        return self._waiting

    def defer(self, tokens: Tensor) -> None:
        """Have ``tokens [n]`` come with the next fetch."""
        assert self._waiting is None
        self._waiting = tokens

    def fetch(self, answers: Tensor) -> list[bool]:
        """``answers``, bool ``[n]``, and what waits along with them."""
        self.count += 1
        if self._waiting is None:
            return answers.tolist()
        numbers = torch.cat([answers.to(self._waiting.dtype), self._waiting]).tolist()
        self._brought, self._waiting = numbers[len(answers) :], None
        return [number != 0 for number in numbers[: len(answers)]]

    def fetch_tokens(self) -> list[int]:
        """What was to come later: from the last fetch, or by one of its own."""
        if self._waiting is not None:
            self.count += 1
            self._brought, self._waiting = self._waiting.tolist(), None
        brought, self._brought = self._brought, []
        return brought
