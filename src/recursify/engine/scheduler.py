"""Which tokens enter the next iteration. It decides on page numbers and counts alone.

Every request that runs has one flight. Those under way go on; every request without one gets its next token in, or the
next chunk of its prompt, the oldest first; what room is left goes to requests that wait, in the order of their arrival.
Where pages run out, the request that began last gives its own back and waits again, in front: the oldest one always
gets on, and so do all in their turn.
"""

from __future__ import annotations

from collections import deque

from .chunk import Chunk
from .layers.kv_cache import KVCache
from .page_pool import page_keys
from .request import Request


class Scheduler:
    """The queues.

    Args:
        pages: Of keys and values.
        max_num_seqs: Requests that run at once.
        max_num_batched_tokens: Tokens of an iteration, as far as prompts are to blame: new tokens always get in.
        chunk_size: Tokens of a prompt that enter together.
        enable_prefix_caching: Take over pages of a known prefix.
        lockstep: Let new tokens in only when no flight is under way, as engines do that know no depths. A control.

    Attributes:
        waiting: In the order in which they will begin.
        running: In the order in which they began.
        flights: By request id.
        residents: Ids of requests that run on the device for now (``residents.py``), and have no flights.
        preemptions: How often one had to begin again.
    """

    def __init__(
        self,
        pages: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunk_size: int,
        enable_prefix_caching: bool,
        lockstep: bool = False,
    ) -> None:
        self.kv_cache = pages
        self.max_num_seqs, self.max_num_batched_tokens, self.chunk_size = (
            max_num_seqs,
            max_num_batched_tokens,
            chunk_size,
        )
        self.enable_prefix_caching, self.lockstep = enable_prefix_caching and not pages.is_packed, lockstep
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.chunks: dict[int, Chunk] = {}
        self.device_requests: set[int] = set()
        self.preemptions = 0
        self.cached_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> tuple[list[Chunk], list[Chunk]]:
        """All flights of the next iteration, and those of them that are new."""
        if self.lockstep and self.chunks:
            return list(self.chunks.values()), []  # none of them new
        preemptions = self.preemptions
        for request in list(self.running):
            busy = request.id in self.chunks or request.id in self.device_requests
            if not busy and request in self.running and not request.is_complete:
                self._launch(request)
        # What has just given its pages back does not take them again at once.
        admits = preemptions == self.preemptions
        while admits and self.waiting and len(self.running) < self.max_num_seqs and self._budget() > 0:
            admits = self._admit(self.waiting[0])
        chunks = list(self.chunks.values())
        return chunks, [chunk for chunk in chunks if chunk.embedded is None]

    def _budget(self) -> int:
        """How many more tokens of prompts may enter."""
        under_way = len(self.device_requests) + sum(len(chunk.positions) for chunk in self.chunks.values())
        return self.max_num_batched_tokens - under_way

    def _launch(self, request: Request) -> bool:
        """Let the next tokens of a running request in, if there is room for any."""
        known = request.prompt_length + len(request.exit_depths)
        count = 1
        if request.computed < known:
            count = min(known - request.computed, self.chunk_size, self._budget())
            if count < 1:
                return False
        if not self.make_room(request, count):
            return False
        self.chunks[request.id] = Chunk(request, count)
        return True

    def make_room(self, request: Request, count: int) -> bool:
        """Pages for ``count`` more tokens of ``request``, if need be those of younger ones; False if it is youngest."""
        while not self.kv_cache.reserve(request, count):
            last = self.running[-1]
            self.preempt(last)
            if last is request:
                return False
        return True

    def move_to_device(self, chunk: Chunk) -> Request:
        """The request of ``flight``, which has not begun, goes on as a resident."""
        del self.chunks[chunk.request.id]
        self.device_requests.add(chunk.request.id)
        return chunk.request

    def _admit(self, request: Request) -> bool:
        """Begin a waiting request, if there is room for its whole prompt and a token more."""
        prefix: list[int] = []
        if self.enable_prefix_caching:
            pool = self.kv_cache.pools[0]
            if request.prefix_keys is None:
                # Without the last token, which runs in any case: what follows is read from it.
                request.prefix_keys = page_keys(request.prompt_ids[:-1], pool.page_size)
            prefix = pool.find_prefix(request.prefix_keys)
            pool.share(prefix)
            request.tables[0].extend(prefix)
            request.computed = len(prefix) * self.kv_cache.page_size
        known = request.prompt_length + len(request.exit_depths)
        # And for the token after that: without, it would give all back to begin again, as often as it was let in.
        if not self.kv_cache.has_room(request, known - request.computed + 1):
            self.kv_cache.release(request)
            request.computed = 0
            return False
        self.waiting.popleft()
        self.running.append(request)
        if not request.output.preemptions:
            request.output.cached_tokens = request.computed
            self.cached_tokens += request.computed
        return self._launch(request)

    def preempt(self, request: Request) -> None:
        """Take all pages from ``request`` and have it begin again, before all that wait."""
        self.preemptions += 1
        request.output.preemptions += 1
        self.remove(request)
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Take ``request`` out, wherever it is, with its flight and its pages."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.chunks.pop(request.id, None)
        self.device_requests.discard(request.id)
        self.kv_cache.release(request)
        request.reset()

    def commit(self, chunk: Chunk) -> None:
        """``flight`` is done: its tokens have been computed."""
        request = chunk.request
        del self.chunks[request.id]
        request.computed = chunk.stop
        self.kv_cache.trim(request)

    def cache_full_pages(self, request: Request) -> None:
        """Have others find the pages of ``request`` whose keys and values are exact at all depths."""
        if not self.enable_prefix_caching:
            return
        stop = min(request.computed, request.prompt_length) if request.params.may_exit_early else request.computed
        self.kv_cache.pools[0].cache_full_pages(request.tokens[:stop], request.tables[0])
