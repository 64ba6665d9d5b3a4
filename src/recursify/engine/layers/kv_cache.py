"""Paged KV cache of all requests.

A stored layer's keys are one tensor ``[pages, page_size, heads, head size]`` for all depths at which it runs. A page id
is valid for all layers, and names the page ``id + offset[d]`` at depth ``d``, so one call reads and writes rows of
different depths.

A *stream* is a set of layers and depths that hold the same tokens, and so share page ids:

- a model whose tokens all have keys everywhere has one stream; ``offset[d] = d · num_pages``;
- a routed model (``recursion_wise``) has one for prelude and coda, and one per depth of the block, which holds the
  tokens that run that depth, packed; deeper streams have fewer pages, by the capacities of the routers;
- with ``shared`` keys it has two: all depths read the keys of depth 0, ``offset[d] = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from recursify.engine.page_pool import PagePool, pages_for
from recursify.engine.request import Request
from recursify.errors import EngineError

from .decoder import DecoderAdapter, PagedLayer

HEADROOM = 1.1
"""Head-room of the per-depth page pools over the routers' capacities, because the load varies at inference."""


@dataclass(frozen=True)
class PageLayout:
    """Streams and page offsets of the depths.

    Attributes:
        num_pages: Number of pages of each stream.
        stream_of: Stream of each depth; prelude and coda are in stream 0.
        offsets: Page offset of each depth.
        block_pages: Number of pages in a block layer's tensor.
    """

    num_pages: tuple[int, ...]
    stream_of: tuple[int, ...]
    offsets: tuple[int, ...]
    block_pages: int

    @classmethod
    def plan(cls, decoder: DecoderAdapter, kv: str, num_pages: int, longest: int) -> PageLayout:
        """Lay out ``num_pages`` of stream 0 for a KV mode; a routed model's streams have ``longest`` pages at least."""
        depths = decoder.num_depths
        if kv == "shared":
            return cls((num_pages, num_pages), (1,) * depths, (0,) * depths, num_pages)
        if kv == "recursion_wise":
            sizes = [
                min(num_pages, max(longest, round(num_pages * capacity * (HEADROOM if capacity < 1 else 1))))
                for capacity in decoder.capacities
            ]
            offsets = tuple(accumulate(sizes[:-1], initial=0))
            return cls((num_pages, *sizes), tuple(range(1, depths + 1)), offsets, sum(sizes))
        return cls((num_pages,), (0,) * depths, tuple(depth * num_pages for depth in range(depths)), depths * num_pages)


class KVCache:
    """Page pools, and the tensors of the layers.

    Attributes:
        context: Number of tokens of the longest request.
        is_packed: True if streams hold only the tokens that run their depth, so that a slot is not a position.
        positions: Positions of packed keys, ``[pages, page_size]``, which windows need.
    """

    def __init__(self, decoder: DecoderAdapter, kv: str, page_size: int, num_pages: int, context: int) -> None:
        self.decoder, self.kv, self.page_size, self.context = decoder, kv, page_size, context
        self.layout = PageLayout.plan(decoder, kv, num_pages, min(num_pages, pages_for(context, page_size)))
        self.pools = [PagePool(count, page_size) for count in self.layout.num_pages]
        self.is_packed = kv in ("recursion_wise", "shared")
        for layer in decoder.layers:
            count = self.layout.block_pages if layer.part == "block" else num_pages
            like = {"dtype": decoder.dtype, "device": decoder.device}
            layer.keys = torch.zeros(count, page_size, *layer.key_shape, **like)
            layer.values = torch.zeros(count, page_size, *layer.value_shape, **like)
        self.positions = torch.zeros(self.layout.block_pages, page_size, dtype=torch.long, device=decoder.device)
        self._page_bytes = [0] * len(self.pools)  # of each stream
        for layer in decoder.layers:
            streams = self.layout.stream_of if layer.part == "block" else (0,)
            for stream in streams[:1] if kv == "shared" else streams:
                self._page_bytes[stream] += _bytes_per_page(layer, decoder, page_size)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.decoder.layers)

    def bytes_used(self) -> int:
        """Number of bytes of the pages in use."""
        return sum(pool.num_used * num_bytes for pool, num_bytes in zip(self.pools, self._page_bytes, strict=True))

    @property
    def num_used(self) -> int:
        """Number of pages in use, summed over streams."""
        return sum(pool.num_used for pool in self.pools)

    def missing(self, request: Request, count: int) -> list[int]:
        """Pages that ``request`` lacks in each stream for ``count`` more tokens, if all of them ran everywhere."""
        lengths = [request.computed] + [len(request.packed.get(depth, ())) for depth in range(len(self.pools) - 1)]
        return [
            max(0, pages_for(length + count, self.page_size) - len(table))
            for length, table in zip(lengths, request.tables, strict=True)
        ]

    def has_room(self, request: Request, count: int) -> bool:
        """True if there are pages for ``count`` more tokens of ``request``."""
        return self._are_free(self.missing(request, count))

    def _are_free(self, counts: list[int]) -> bool:
        """True if every stream has this many free pages."""
        return all(count <= pool.num_free for count, pool in zip(counts, self.pools, strict=True))

    def reserve(self, request: Request, count: int) -> bool:
        """Give ``request`` pages for ``count`` more tokens; return False, and give none, if there are not enough."""
        missing = self.missing(request, count)
        if not self._are_free(missing):
            return False
        for num_missing, pool, table in zip(missing, self.pools, request.tables, strict=True):
            table.extend(pool.allocate(num_missing))
        return True

    def trim(self, request: Request) -> None:
        """Free the pages of a routed model that were reserved for tokens that did not run a depth."""
        if not self.is_packed:
            return
        for depth, (pool, table) in enumerate(zip(self.pools[1:], request.tables[1:], strict=True)):
            needed = pages_for(len(request.packed.get(depth, ())), self.page_size)
            pool.release(table[needed:])
            del table[needed:]

    def release(self, request: Request) -> None:
        """Free all pages of ``request``."""
        for pool, table in zip(self.pools, request.tables, strict=True):
            pool.release(table)
            table.clear()

    def block_table(self, request: Request, depth: int | None) -> list[int]:
        """Pages of ``request`` in the tensors of block layers at ``depth``, or of prelude and coda for None."""
        if depth is None:
            return request.tables[0]
        offset = self.layout.offsets[depth]
        return [page + offset for page in request.tables[self.layout.stream_of[depth]]]

    def slots(self, request: Request, depth: int, positions: Sequence[int]) -> list[int]:
        """KV slots of tokens in block layers at ``depth``, in a model whose tokens have keys everywhere."""
        table, size = self.block_table(request, depth), self.page_size
        return [table[position // size] * size + position % size for position in positions]


def pages_that_fit(num_bytes: int, decoder: DecoderAdapter, kv: str, page_size: int) -> int:
    """Number of pages that ``num_bytes`` hold, at all layers and depths.

    Raises:
        EngineError: Not even one page fits.
    """
    depths = {"shared": 1.0, "recursion_wise": sum(decoder.capacities)}.get(kv, decoder.num_depths)
    by_layer = ((depths if layer.part == "block" else 1, layer) for layer in decoder.layers)
    size = int(sum(times * _bytes_per_page(layer, decoder, page_size) for times, layer in by_layer))
    if num_bytes < size:
        raise EngineError(
            f"{num_bytes:,} bytes of KV cache are too few: one page of {page_size} tokens takes {size:,} bytes. "
            f"Increase kv_cache_memory_bytes."
        )
    return num_bytes // size


def _bytes_per_page(layer: PagedLayer, decoder: DecoderAdapter, page_size: int) -> int:
    """Number of bytes of a page's keys and values in ``layer`` at one depth."""
    return page_size * (math.prod(layer.key_shape) + math.prod(layer.value_shape)) * decoder.dtype.itemsize


def copy_slots(layers: Sequence[PagedLayer], sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of block layers from the slots ``sources [n]`` to the slots ``targets [n]``."""
    for layer in layers:
        for cache in (layer.keys, layer.values):
            flat = cache.flatten(0, 1)
            flat[targets] = flat[sources]
