"""Page numbers: which are free, which are in use, and which hold a prefix that another request can take over.

One page holds the keys and values of ``page_size`` tokens, in all layers and at all depths of its stream
(``kv_pages.py``). Nothing here touches a tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice


class PagePool:
    """The pages of one stream.

    A page that nobody uses keeps what it holds until it is given out again, so a prefix can be found long after the
    request that made it is gone. Pages are given out from the one that has been free the longest.

    Args:
        num_pages: How many there are.
        page_size: Tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = dict.fromkeys(range(num_pages))  # ordered, and quick to take one out of
        self._users = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages, whose content is forgotten; the caller has seen to it that there are so many."""
        assert count <= self.num_free
        pages = list(islice(self._free, count))
        for page in pages:
            assert self._users[page] == 0
            del self._free[page]
            self._forget(page)
            self._users[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; the last of a prefix is the first to be given out again."""
        for page in reversed(pages):
            assert self._users[page] > 0
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None

    def find_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest known prefix of what has these :func:`page_keys`."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def share(self, pages: Sequence[int]) -> None:
        """Use pages that :meth:`find_prefix` found."""
        for page in pages:
            if self._users[page] == 0:
                del self._free[page]
            self._users[page] += 1

    def cache_full_pages(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Have it known that ``pages`` hold ``tokens``, from the first one on. Only whole pages count."""
        for key, page in zip(page_keys(tokens, self.page_size), pages, strict=False):
            if key not in self._page_of and self._key_of[page] is None:
                self._page_of[key] = page
                self._key_of[page] = key

    def _forget(self, page: int) -> None:
        key = self._key_of[page]
        if key is not None:
            del self._page_of[key]
            self._key_of[page] = None


def page_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """For every whole page of ``tokens``, a digest of it and of all before it."""
    keys, before = [], b""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = ",".join(map(str, tokens[start : start + page_size]))
        before = hashlib.blake2b(before + page.encode(), digest_size=16).digest()
        keys.append(before)
    return keys


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages ``num_tokens`` take."""
    return -(-num_tokens // page_size)
