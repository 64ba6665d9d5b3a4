"""Requests of a benchmark, and the forced exit depths of their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from recursify.errors import EngineError

TABLE_LENGTH = 997
"""Number of forced depths that are drawn; a prime, so that rotations by a fixed step differ."""


@dataclass(frozen=True)
class Workload:
    """Requests that are all submitted at the start.

    Attributes:
        prompts: Token ids of each prompt.
        new_tokens: Number of tokens to generate per prompt; EOS is ignored.
        concurrency: Maximum number of requests that run at once.
        context: Number of tokens of the longest request.
    """

    prompts: list[list[int]]
    new_tokens: list[int]
    concurrency: int
    context: int

    @property
    def total(self) -> int:
        """Number of new tokens of all requests."""
        return sum(self.new_tokens)

    def with_new_tokens(self, new: int) -> Workload:
        """Return the same prompts with ``new`` tokens to generate for each."""
        return replace(self, new_tokens=[new] * len(self.prompts))

    @classmethod
    def draw(
        cls, sources: Sequence[Sequence[int]], concurrency: int, count: int, new: int, *, even: bool, seed: int
    ) -> Workload:
        """Draw requests with different lengths, as in use.

        Args:
            sources: Token sequences; prompts are their beginnings, from half of a sequence to all of it.
            concurrency: Maximum number of requests that run at once.
            count: Number of requests.
            new: Mean number of new tokens, drawn from ``new / 4`` to ``7 new / 4``.
            even: Use whole sequences as prompts, and exactly ``new`` new tokens.
            seed: Seed of the lengths.
        """
        draw = random.Random(seed)
        prompts, lengths = [], []
        for number in range(count):
            source = list(sources[number % len(sources)])
            keep = len(source) if even else draw.randint(max(1, len(source) // 2), len(source))
            prompts.append(source[:keep])
            lengths.append(new if even else draw.randint(max(1, new // 4), max(1, 7 * new // 4)))
        return cls(prompts, lengths, concurrency, max(map(len, sources)) + 7 * new // 4 + 1)


@dataclass(frozen=True)
class ForcedExits:
    """Exit depths that are forced on tokens: a table in random order, rotated for every request."""

    table: tuple[int, ...]

    @classmethod
    def draw(cls, fractions: Sequence[float], count: int = TABLE_LENGTH, seed: int = 0) -> ForcedExits:
        """Draw a table of ``count`` depths, of which the fraction ``fractions[d]`` is depth ``d``.

        Raises:
            EngineError: The fractions do not add up to 1.
        """
        if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
            raise EngineError(f"The fractions of forced exits must add up to 1, got {list(fractions)}.")
        depths = [depth for depth, fraction in enumerate(fractions) for _ in range(round(fraction * count))][:count]
        depths += [len(fractions) - 1] * (count - len(depths))
        random.Random(seed).shuffle(depths)
        return cls(tuple(depths))

    @property
    def mean_recursions(self) -> float:
        """Mean number of recursions per token."""
        return sum(self.table) / len(self.table) + 1

    def params(self, workload: Workload, number: int) -> dict[str, Any]:
        """Return the sampling parameters of request ``number``."""
        start = 31 * number % len(self.table)
        return {"forced_depths": self.table[start:] + self.table[:start]}
