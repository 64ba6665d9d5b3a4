"""Pool of KV-cache pages: which are free, in use, or hold a prefix that another request can reuse.

One page holds the keys and values of ``page_size`` tokens, in all layers and at all depths of its stream
(``layers/kv_cache.py``). Nothing here touches a tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice


class PagePool:
    """Pages of one stream, with reference counts and a prefix cache.

    A free page keeps its content until it is allocated again, so a prefix can be found long after its request ended.
    The page that has been free the longest is allocated first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = dict.fromkeys(range(num_pages))  # an ordered set
        self._users = [0] * num_pages
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Number of pages without a user."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of pages with a user."""
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages, of which at least that many must be free; their content is forgotten."""
        assert count <= self.num_free
        pages = list(islice(self._free, count))
        for page in pages:
            assert self._users[page] == 0
            del self._free[page]
            self._forget(page)
            self._users[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one user of each page. The last pages of a prefix are allocated again before its first ones."""
        for page in reversed(pages):
            assert self._users[page] > 0
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None

    def find_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest cached prefix of the :func:`page_keys` ``keys``."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def share(self, pages: Sequence[int]) -> None:
        """Add a user to pages that :meth:`find_prefix` found."""
        for page in pages:
            if self._users[page] == 0:
                del self._free[page]
            self._users[page] += 1

    def cache_full_pages(self, tokens: Sequence[int], pages: Sequence[int], seed: bytes = b"") -> None:
        """Add the full ones of ``pages``, which hold ``tokens`` from the first token on, to the prefix cache.

        Pages computed in different ways from the same tokens have another ``seed``.
        """
        for key, page in zip(page_keys(tokens, self.page_size, seed), pages, strict=False):
            if key not in self._page_of and self._key_of[page] is None:
                self._page_of[key] = page
                self._key_of[page] = key

    def _forget(self, page: int) -> None:
        key = self._key_of[page]
        if key is not None:
            del self._page_of[key]
            self._key_of[page] = None


def page_keys(tokens: Sequence[int], page_size: int, seed: bytes = b"") -> list[bytes]:
    """Digest of every full page of ``tokens`` together with ``seed`` and all pages before it."""
    keys, previous = [], seed
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = ",".join(map(str, tokens[start : start + page_size]))
        previous = hashlib.blake2b(previous + page.encode(), digest_size=16).digest()
        keys.append(previous)
    return keys


def pages_for(num_tokens: int, page_size: int) -> int:
    """Number of pages that ``num_tokens`` take."""
    return -(-num_tokens // page_size)
