"""Page numbers: none is lost, none is given out twice, and a prefix is what it is said to be."""

from hypothesis import given, settings
from hypothesis import strategies as st

from recursify.engine.page_pool import PagePool, page_keys, pages_for


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7), st.integers(1, 9)), max_size=60))
def test_pages_are_kept_track_of(steps):
    """Random takings, sharings and givings back, beside a plain count of who holds what."""
    pool = PagePool(12, 2)
    held: dict[int, tuple[list[int], list[int]]] = {}
    for number, (what, which, length) in enumerate(steps):
        if what == 0 and held:
            tokens, pages = held.pop(sorted(held)[which % len(held)])
            pool.release(pages)
        else:
            tokens = [which % 3] * length
            prefix = pool.find_prefix(page_keys(tokens[:-1], 2)) if what == 2 else []
            assert len(prefix) * 2 < len(tokens), "the last token is to run"
            pool.share(prefix)
            count = pages_for(length, 2) - len(prefix)
            if count > pool.num_free:
                pool.release(prefix)
                continue
            pages = [*prefix, *pool.allocate(count)]
            pool.cache_full_pages(tokens, pages)
            held[number] = tokens, pages
        users: dict[int, int] = {}
        for _, pages in held.values():
            for page in pages:
                users[page] = users.get(page, 0) + 1
        assert pool.num_used == len(users)
        assert pool.num_free + pool.num_used == 12
        for tokens, pages in held.values():
            assert len(set(pages)) == len(pages)
            for other, others in held.values():
                both = min(len(tokens), len(other)) // 2
                if tokens[0] != other[0]:
                    assert not set(pages[:both]) & set(others[:both]), "pages of another text"


def test_a_prefix_outlives_its_request():
    """Until its pages are given out again, the one that has been free the longest first."""
    pool = PagePool(4, 2)
    pages = pool.allocate(2)
    pool.cache_full_pages([1, 2, 3, 4], pages)
    pool.release(pages)
    assert pool.find_prefix(page_keys([1, 2, 3, 4, 5][:-1], 2)) == pages
    assert pool.find_prefix(page_keys([1, 2, 3, 4][:-1], 2)) == pages[:1], "the last token is to run"
    assert pool.find_prefix(page_keys([1, 2, 9][:-1], 2)) == pages[:1]
    assert pool.find_prefix(page_keys([9, 2, 3][:-1], 2)) == []
    pool.allocate(3)
    assert pool.find_prefix(page_keys([1, 2, 3, 4, 5][:-1], 2)) == pages[:1], "its end was given out first"
    pool.allocate(1)
    assert pool.find_prefix(page_keys([1, 2, 3, 4, 5][:-1], 2)) == []


def test_keys_tell_apart():
    """A page is known by itself and by all before it."""
    assert page_keys([1, 2, 3, 4], 2) == page_keys([1, 2, 3, 4, 5], 2)
    assert page_keys([12, 3], 2) != page_keys([1, 23], 2)
    assert page_keys([9, 9, 3, 4], 2)[1] != page_keys([1, 2, 3, 4], 2)[1]
