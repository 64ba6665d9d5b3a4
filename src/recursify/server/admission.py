"""How many answers are under way at once: what is more is sent away, and told when to come back."""

from __future__ import annotations

import math
import time

from .errors import ApiError


class Admission:
    """Counts answers, from when they are asked for to when they have ended.

    Args:
        running: That the engine works on at once.
        waiting: That may wait for it.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.running, self.capacity = running, running + waiting
        self.taken = 0
        self.refused = 0
        self._seconds = 1.0

    def take(self, count: int) -> Ticket:
        """Places for ``count`` answers.

        Raises:
            ApiError: There are not so many.
        """
        if count > self.capacity:
            message = (
                f"The request asks for {count} answers, and the server takes {self.capacity} at once. Ask for less."
            )
            raise ApiError(400, message, code="limit_exceeded")
        if self.taken + count > self.capacity:
            self.refused += 1
            raise ApiError(
                429,
                f"{self.taken} answers are under way, and the server takes {self.capacity} at once. Try again later.",
                code="queue_full",
                headers={"retry-after": str(self._retry_after())},
            )
        self.taken += count
        return Ticket(self, count)

    def _retry_after(self) -> int:
        """Seconds in which a place is likely to be free."""
        return min(60, max(1, math.ceil(self._seconds / self.running)))

    def give_back(self, count: int, seconds: float) -> None:
        """``count`` answers have ended, after so many seconds."""
        self.taken -= count
        self._seconds += 0.1 * (seconds - self._seconds)


class Ticket:
    """Places of one request; they can be given back more than once, and count once."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission, self._count, self._since = admission, count, time.monotonic()

    def give_back(self) -> None:
        """The request has ended."""
        count, self._count = self._count, 0
        if count:
            self._admission.give_back(count, time.monotonic() - self._since)
