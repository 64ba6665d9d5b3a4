"""Admission control: bounds the number of concurrent completions; the rest get 429 with Retry-After."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from .errors import ApiError


class Admission:
    """Counts completions that run or wait, and refuses more than ``running`` at once and ``waiting`` for the engine."""

    def __init__(self, running: int, waiting: int) -> None:
        self.running, self.capacity = running, running + waiting
        self.admitted = 0
        self._mean_seconds = 1.0

    @contextlib.contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Admit ``count`` completions, which end with the block; raise an ApiError if the capacity is exhausted."""
        limit = f"this server allows {self.capacity} at once"
        if count > self.capacity:
            message = f"The request asks for {count} completions; {limit}. Ask for fewer."
            raise ApiError(400, message, code="limit_exceeded")
        if self.admitted + count > self.capacity:
            message = f"{self.admitted} completions are in progress; {limit}. Try again later."
            seconds_until_end = math.ceil(self._mean_seconds / self.running)
            headers = {"retry-after": str(min(60, max(1, seconds_until_end)))}
            raise ApiError(429, message, code="queue_full", headers=headers)
        self.admitted += count
        started = time.monotonic()
        try:
            yield
        finally:
            self.admitted -= count
            self._mean_seconds += 0.1 * (time.monotonic() - started - self._mean_seconds)
