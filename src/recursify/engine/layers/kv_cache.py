"""Keys and values of all requests, in pages.

A physical layer's keys are one tensor ``[pages, page_size, heads, head size]`` for all depths at which it runs. A page
id is good for all layers, and at depth ``d`` it names the page ``id + offset[d]``, so rows of different depths are read
and written in one call.

A *stream* is a set of layers and depths that hold the same tokens, and so share page ids:

- a model whose tokens all have keys everywhere has one stream; ``offset[d] = d · num_pages``;
- a routed model (``recursion_wise``) has one for prelude and coda, and one for every depth of the block, which holds
  the tokens that go there, packed; the deeper ones have fewer pages, by the capacities of the routers;
- with ``shared`` keys it has two: all depths read what depth 0 wrote, ``offset[d] = 0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from recursify.engine.page_pool import PagePool, pages_for
from recursify.engine.request import Request
from recursify.errors import EngineError

from .decoder import DecoderAdapter, PagedLayer

SPARE = 1.1
"""A routed model's deeper pools are so much larger than its capacities say: loads of inference vary around those."""


@dataclass(frozen=True)
class PageLayout:
    """Which stream and offset a depth has.

    Attributes:
        num_pages: Per stream.
        stream_of: By depth; prelude and coda are in stream 0.
        offsets: By depth.
        block_pages: Pages in a block layer's tensor.
    """

    num_pages: tuple[int, ...]
    stream_of: tuple[int, ...]
    offsets: tuple[int, ...]
    block_pages: int

    @classmethod
    def plan(cls, decoder: DecoderAdapter, kv: str, num_pages: int, longest: int) -> PageLayout:
        """The layout of ``kv`` (:data:`~.engine.KV_MODES`) for ``num_pages`` of whole tokens.

        Args:
            parts: The model.
            kv: The mode.
            num_pages: Of stream 0.
            longest: Pages that a routed model's every stream has at least: one whole request.
        """
        depths = decoder.num_depths
        if kv == "shared":
            return cls((num_pages, num_pages), (1,) * depths, (0,) * depths, num_pages)
        if kv == "recursion_wise":
            sizes = [
                min(num_pages, max(longest, round(num_pages * capacity * (SPARE if capacity < 1 else 1))))
                for capacity in decoder.capacities
            ]
            offsets = tuple(accumulate(sizes[:-1], initial=0))
            return cls((num_pages, *sizes), tuple(range(1, depths + 1)), offsets, sum(sizes))
        return cls((num_pages,), (0,) * depths, tuple(depth * num_pages for depth in range(depths)), depths * num_pages)


class KVCache:
    """The pools of page ids, and the tensors.

    Args:
        decoder: The model.
        kv: The mode of keys and values.
        page_size: Tokens per page.
        num_pages: Of whole tokens.
        context: Tokens of the longest request.
    """

    def __init__(self, decoder: DecoderAdapter, kv: str, page_size: int, num_pages: int, context: int) -> None:
        self.decoder, self.kv, self.page_size, self.context = decoder, kv, page_size, context
        self.layout = PageLayout.plan(decoder, kv, num_pages, min(num_pages, pages_for(context, page_size)))
        self.pools = [PagePool(count, page_size) for count in self.layout.num_pages]
        self.is_packed = kv in ("recursion_wise", "shared")
        for layer in decoder.layers:
            count = self.layout.block_pages if layer.part == "block" else num_pages
            shape = (count, page_size, decoder.num_kv_heads, decoder.head_size)
            layer.keys = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
            layer.values = torch.zeros_like(layer.keys)
        # Slots of packed streams are not positions, which windows need.
        self.positions = torch.zeros(self.layout.block_pages, page_size, dtype=torch.long, device=decoder.device)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.decoder.layers)

    def bytes_used(self) -> int:
        """Of the pages that are given out."""
        per_page = [0] * len(self.pools)
        size = 2 * self.page_size * self.decoder.num_kv_heads * self.decoder.head_size * self.decoder.dtype.itemsize
        for layer in self.decoder.layers:
            streams = self.layout.stream_of if layer.part == "block" else (0,)
            if self.kv == "shared":
                streams = streams[:1]
            for stream in streams:
                per_page[stream] += size
        return sum(pool.num_used * each for pool, each in zip(self.pools, per_page, strict=True))

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self.pools)

    def missing(self, request: Request, count: int) -> list[int]:
        """Per stream, how many pages ``request`` lacks for ``count`` more tokens, should all go everywhere."""
        held = [request.computed] + [len(request.packed.get(depth, ())) for depth in range(len(self.pools) - 1)]
        return [
            max(0, pages_for(tokens + count, self.page_size) - len(table))
            for tokens, table in zip(held, request.tables, strict=True)
        ]

    def has_room(self, request: Request, count: int) -> bool:
        """Whether ``count`` more tokens of ``request`` find pages."""
        return self._are_free(self.missing(request, count))

    def _are_free(self, counts: list[int]) -> bool:
        """Whether every stream has so many pages to give."""
        return all(count <= pool.num_free for count, pool in zip(counts, self.pools, strict=True))

    def reserve(self, request: Request, count: int) -> bool:
        """Give ``request`` pages for ``count`` more tokens; False, and nothing given, if there are not enough."""
        missing = self.missing(request, count)
        if not self._are_free(missing):
            return False
        for lack, pool, table in zip(missing, self.pools, request.tables, strict=True):
            table.extend(pool.allocate(lack))
        return True

    def trim(self, request: Request) -> None:
        """Take back the pages that tokens of a routed model did not go to."""
        if not self.is_packed:
            return
        for depth, (pool, table) in enumerate(zip(self.pools[1:], request.tables[1:], strict=True)):
            needed = pages_for(len(request.packed.get(depth, ())), self.page_size)
            pool.release(table[needed:])
            del table[needed:]

    def release(self, request: Request) -> None:
        """Take back all pages of ``request``."""
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.release(table)
            table.clear()

    def physical_table(self, request: Request, depth: int | None) -> list[int]:
        """The pages of ``request`` in the tensors of block layers at ``depth``; of prelude and coda for None."""
        if depth is None:
            return request.tables[0]
        offset = self.layout.offsets[depth]
        return [page + offset for page in request.tables[self.layout.stream_of[depth]]]

    def slots(self, request: Request, depth: int, positions: Sequence[int]) -> list[int]:
        """Where tokens lie in flattened pages of block layers, in a model whose tokens have keys everywhere."""
        table, size = self.physical_table(request, depth), self.page_size
        return [table[position // size] * size + position % size for position in positions]


def pages_that_fit(num_bytes: int, decoder: DecoderAdapter, kv: str, page_size: int) -> int:
    """How many pages of whole tokens ``num_bytes`` hold.

    Raises:
        EngineError: Not one.
    """
    depths = float(decoder.num_depths)
    if kv == "shared":
        depths = 1.0
    elif kv == "recursion_wise":
        depths = sum(decoder.capacities)
    layers = sum(depths if layer.part == "block" else 1.0 for layer in decoder.layers)
    size = int(2 * page_size * decoder.num_kv_heads * decoder.head_size * decoder.dtype.itemsize * layers)
    if num_bytes < size:
        raise EngineError(
            f"{num_bytes:,} bytes of KV cache are too few: one page of {page_size} tokens takes {size:,} bytes. "
            f"Increase kv_cache_memory_bytes."
        )
    return num_bytes // size


def copy_slots(layers: Sequence[PagedLayer], sources: Tensor, targets: Tensor) -> None:
    """Have the ``targets`` slots ``[n]`` of block layers hold what ``sources [n]`` do."""
    for layer in layers:
        for held in (layer.keys, layer.values):
            flat = held.flatten(0, 1)
            flat[targets] = flat[sources]
