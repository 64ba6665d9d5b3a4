"""Scheduling: which tokens enter the next iteration. Works on page numbers and counts, never on tensors.

Every running request has one chunk. Chunks in progress continue; every request without one schedules its next token or
prompt chunk, oldest request first; the remaining budget goes to waiting requests in order of arrival. When pages run
out, the request that started last is preempted: it frees its pages and returns to the front of the queue. So the oldest
request always progresses, and none starves.
"""

from __future__ import annotations

from collections import deque

from .chunk import Chunk
from .config import EngineConfig
from .layers.kv_cache import KVCache
from .page_pool import page_keys
from .request import Request


class Scheduler:
    """Queues of requests, and the chunks that they have in progress.

    Attributes:
        waiting: Requests that have not started, or were preempted, in the order in which they start.
        running: Requests in the order in which they started.
        chunks: Mapping from request id to the chunk in progress.
        device_requests: Ids of the requests that run in the device loop, and so have no chunks.
        preemptions: Number of preemptions.
        cached_tokens: Number of prompt tokens found in the prefix cache.
    """

    def __init__(self, kv_cache: KVCache, config: EngineConfig) -> None:
        self.kv_cache, self.lockstep = kv_cache, config.lockstep
        self.max_num_seqs, self.chunk_size = config.max_num_seqs, config.chunk_size
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.length_rope = kv_cache.decoder.length_rope
        self.enable_prefix_caching = config.enable_prefix_caching and not kv_cache.is_packed
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.chunks: dict[int, Chunk] = {}
        self.device_requests: set[int] = set()
        self.preemptions = 0
        self.cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """True if any request is waiting or running."""
        return bool(self.waiting or self.running)

    def schedule(self) -> tuple[list[Chunk], list[Chunk]]:
        """Return all chunks of the next iteration, and those of them that are new."""
        if self.lockstep and self.chunks:
            return list(self.chunks.values()), []
        preemptions = self.preemptions
        for request in list(self.running):
            busy = request.id in self.chunks or request.id in self.device_requests
            if not busy and request in self.running and not request.is_complete:
                self._start_chunk(request)
        # A request that was just preempted does not take its pages back in the same iteration.
        admits = preemptions == self.preemptions
        while admits and self.waiting and len(self.running) < self.max_num_seqs and self._budget() > 0:
            admits = self._admit(self.waiting[0])
        chunks = list(self.chunks.values())
        return chunks, [chunk for chunk in chunks if chunk.embedded is None]

    def _budget(self) -> int:
        """Number of prompt tokens that may still be scheduled."""
        scheduled = len(self.device_requests) + sum(len(chunk.positions) for chunk in self.chunks.values())
        return self.max_num_batched_tokens - scheduled

    def _start_chunk(self, request: Request) -> bool:
        """Schedule the next tokens of a running request; return whether budget and pages allowed it."""
        self._start_again(request)
        num_known = request.prompt_length + len(request.exit_depths)
        count = 1
        if request.computed < num_known:
            count = min(num_known - request.computed, self.chunk_size, self._budget())
            if count < 1:
                return False
        if not self.make_room(request, count):
            return False
        self.chunks[request.id] = Chunk(request, count)
        return True

    def _start_again(self, request: Request) -> None:
        """Drop everything computed for a request that grows into other RoPE frequencies, if its family does."""
        rope, length = self.length_rope, len(request.tokens)
        if rope is None or not rope.starts_again or rope.key(length) == rope.key(request.rope_length):
            return
        request.rope_length, request.prefix_keys = length, None
        self.kv_cache.release(request)
        request.reset()

    def make_room(self, request: Request, count: int) -> bool:
        """Reserve pages for ``count`` more tokens, preempting younger requests if needed.

        Returns False if ``request`` is the youngest one, and was preempted itself.
        """
        while not self.kv_cache.reserve(request, count):
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def move_to_device(self, chunk: Chunk) -> Request:
        """Move the request of a chunk that has not entered yet to the device loop."""
        del self.chunks[chunk.request.id]
        self.device_requests.add(chunk.request.id)
        return chunk.request

    def _admit(self, request: Request) -> bool:
        """Start a waiting request, if there is room for its whole prompt and one more token."""
        prefix: list[int] = []
        if self.enable_prefix_caching:
            pool = self.kv_cache.pools[0]
            if request.prefix_keys is None:
                # Without the last token, which runs in any case: its logits are needed.
                request.prefix_keys = page_keys(request.prompt_ids[:-1], pool.page_size, self._prefix_seed(request))
            prefix = pool.find_prefix(request.prefix_keys)
            pool.share(prefix)
            request.tables[0].extend(prefix)
            request.computed = len(prefix) * self.kv_cache.page_size
        num_known = request.prompt_length + len(request.exit_depths)
        # One more token, or the request could be preempted at its first new token, start again, and so on forever.
        if not self.kv_cache.has_room(request, num_known - request.computed + 1):
            self.kv_cache.release(request)
            request.computed = 0
            return False
        self.waiting.popleft()
        self.running.append(request)
        if not request.output.preemptions:
            request.output.cached_tokens = request.computed
            self.cached_tokens += request.computed
        return self._start_chunk(request)

    def preempt(self, request: Request) -> None:
        """Free all pages of ``request``, and put it at the front of the queue to be computed again."""
        self.preemptions += 1
        request.output.preemptions += 1
        self.remove(request)
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Remove ``request`` from its queue, with its chunk and its pages."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.chunks.pop(request.id, None)
        self.device_requests.discard(request.id)
        self.kv_cache.release(request)
        request.reset()

    def commit(self, chunk: Chunk) -> None:
        """Count the tokens of a finished chunk as computed."""
        request = chunk.request
        del self.chunks[request.id]
        request.computed = chunk.stop
        self.kv_cache.trim(request)

    def cache_full_pages(self, request: Request) -> None:
        """Add the pages of ``request`` to the prefix cache, as far as their keys and values are exact at all depths."""
        if not self.enable_prefix_caching:
            return
        exits_early = request.params.may_exit_early
        stop = min(request.computed, request.prompt_length) if exits_early else request.computed
        if self.length_rope is not None:
            stop = min(stop, self.length_rope.num_alike(request))
        seed = self._prefix_seed(request)
        self.kv_cache.pools[0].cache_full_pages(request.tokens[:stop], request.tables[0], seed)

    def _prefix_seed(self, request: Request) -> bytes:
        return b"" if self.length_rope is None else self.length_rope.prefix_seed(request)
