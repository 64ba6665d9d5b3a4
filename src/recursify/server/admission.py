"""Admission control: bounds the number of concurrent completions; the rest get 429 with Retry-After."""

from __future__ import annotations

import math
import time

from .errors import ApiError


class Admission:
    """Counts completions from their admission to their end.

    Args:
        running: Number of completions that the engine runs at once.
        waiting: Number of completions that may wait for the engine.

    Attributes:
        admitted: Number of completions that run or wait.
        refused: Number of requests that were refused.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.running, self.capacity = running, running + waiting
        self.admitted = 0
        self.refused = 0
        self._mean_seconds = 1.0

    def admit(self, count: int) -> Ticket:
        """Admit ``count`` completions.

        Raises:
            ApiError: The capacity is exhausted.
        """
        if count > self.capacity:
            message = (
                f"The request asks for {count} completions; this server allows {self.capacity} at once. Ask for fewer."
            )
            raise ApiError(400, message, code="limit_exceeded")
        if self.admitted + count > self.capacity:
            self.refused += 1
            raise ApiError(
                429,
                f"{self.admitted} completions are in progress; this server allows {self.capacity} at once. Try again "
                f"later.",
                code="queue_full",
                headers={"retry-after": str(self._retry_after())},
            )
        self.admitted += count
        return Ticket(self, count)

    def _retry_after(self) -> int:
        """Estimate the seconds until a completion ends."""
        return min(60, max(1, math.ceil(self._mean_seconds / self.running)))

    def release(self, count: int, seconds: float) -> None:
        """Remove ``count`` completions, which ended ``seconds`` after their admission."""
        self.admitted -= count
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)


class Ticket:
    """Admission of one request's completions; releasing it twice has no further effect."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission, self._count, self._since = admission, count, time.monotonic()

    def release(self) -> None:
        """Release the request's completions."""
        count, self._count = self._count, 0
        if count:
            self._admission.release(count, time.monotonic() - self._since)
