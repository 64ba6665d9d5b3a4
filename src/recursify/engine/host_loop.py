"""Iterations that the host schedules: enter, block, exit test, exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from recursify.modeling.recursive_columns import on_device

from .chunk import Chunk
from .early_exit import EarlyExitStage
from .host_sync import HostSync
from .layers.batch import TokenSpan
from .layers.model_runner import ModelRunner
from .logits import LogitsHead
from .logits_processing import process_logits
from .request import UNREAD, Request
from .routing import RoutingStage
from .sampler import SampledToken, log_probabilities, sample
from .scheduler import Scheduler
from .stats import EngineStats


class HostLoop:
    """Run chunks through one recursion per iteration, and sample from those that exited.

    Attributes:
        stage: Stage between two recursions.
        async_output: True to copy sampled tokens to the host an iteration later, with its exit decisions.
        deliver: Callback that takes sampled tokens and their ids.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stage: EarlyExitStage | RoutingStage,
        scheduler: Scheduler,
        host_sync: HostSync,
        *,
        async_output: bool,
        deliver: Callable[[Iterable[tuple[SampledToken, int]]], None],
    ) -> None:
        self.runner, self.stage, self.scheduler, self.host_sync = runner, stage, scheduler, host_sync
        self.async_output, self.deliver = async_output, deliver
        self.logits_head = LogitsHead(runner)
        self._sampled: list[SampledToken] = []

    def iterate(
        self, chunks: Sequence[Chunk], new: Sequence[Chunk], stats: EngineStats, clock: Callable[[], float]
    ) -> None:
        """Advance ``chunks`` by one recursion, of which ``new`` have not entered yet."""
        started = clock()
        self._enter(new, stats)
        entered = clock()
        stats.enter_seconds += entered - started
        self._run_block([chunk for chunk in chunks if not chunk.is_done], stats, clock)
        passed = clock()
        self._deliver_sampled()  # tokens of the previous iteration, with async_output
        self._exit([chunk for chunk in chunks if chunk.is_done and not chunk.request.finished])
        if not self.async_output:
            self._deliver_sampled()
        stats.exit_seconds += clock() - passed
        stats.iterations += 1

    def _enter(self, chunks: Sequence[Chunk], stats: EngineStats) -> None:
        """Run embedding and prelude on new chunks."""
        if not chunks:
            return
        tokens = [token for chunk in chunks for token in chunk.tokens]
        ids = on_device(tokens, self.runner.device, torch.long)
        unread = [row for row, token in enumerate(tokens) if token == UNREAD]
        if unread:
            index_of = {sampled.request.id: index for index, sampled in enumerate(self._sampled)}
            owners = [chunk.request.id for chunk in chunks for _ in chunk.tokens]
            rows, sources = on_device([unread, [index_of[owners[row]] for row in unread]], self.runner.device)
            assert self.host_sync.pending is not None
            ids[rows] = self.host_sync.pending[sources]
        spans = [TokenSpan(chunk.request, None, chunk.positions) for chunk in chunks]
        embedded, states = self.runner.enter(ids, spans)
        sizes = [len(chunk.positions) for chunk in chunks]
        for chunk, embeddings, entered in zip(chunks, embedded.split(sizes), states.split(sizes), strict=True):
            chunk.embedded, chunk.states = embeddings[-1], entered
            stats.prompt_tokens += max(0, min(chunk.stop, chunk.request.prompt_length) - chunk.start)
        self.stage.enter(chunks)

    def _run_block(self, chunks: Sequence[Chunk], stats: EngineStats, clock: Callable[[], float]) -> None:
        """Run the shared block once for all chunks, then the stage that lets tokens exit."""
        if not chunks:
            return
        chunks = sorted(chunks, key=lambda chunk: chunk.depth)
        spans = [TokenSpan(chunk.request, chunk.depth, chunk.positions) for chunk in chunks]
        started = clock()
        states = self.runner.block(spans, torch.cat([chunk.states for chunk in chunks]))
        ran = clock()
        for chunk, output in zip(chunks, states.split([len(span.positions) for span in spans]), strict=True):
            chunk.states = output
        stats.block_calls += 1
        stats.block_rows += len(states)
        stats.slot_calls += len(chunks)
        stats.slots += self.scheduler.max_num_seqs
        stats.kv_bytes = max(stats.kv_bytes, self.runner.kv_cache.bytes_used())
        stats.block_seconds += ran - started
        self.stage.pass_block(chunks)
        stats.test_seconds += clock() - ran

    def _exit(self, chunks: Sequence[Chunk]) -> None:
        """Run the coda on exited tokens, and sample from the chunks that end with the last known token."""
        if not chunks:
            return
        self.logits_head.run_coda(chunks)
        sampling = [chunk for chunk in chunks if chunk.samples_token]
        if sampling:
            requests = [chunk.request for chunk in sampling]
            logits = self.logits_head.logits(sampling)
            tokens = sample(process_logits(logits, requests), requests)
            log_probs = self._log_probabilities(logits, tokens, requests)
            self.host_sync.defer(tokens)
            self._sampled = [
                SampledToken(chunk.request, chunk.last_exited().depth, log_p)
                for chunk, log_p in zip(sampling, log_probs, strict=True)
            ]
        for chunk in chunks:
            request = chunk.request
            if chunk.is_new:
                request.exit_depths.append(chunk.last_exited().depth)
            self.scheduler.commit(chunk)
            if request.computed == request.prompt_length:
                self.scheduler.cache_full_pages(request)
        for sampled in self._sampled:
            sampled.request.tokens.append(UNREAD)

    def _log_probabilities(
        self, logits: Tensor, tokens: Tensor, requests: Sequence[Request]
    ) -> Sequence[dict[int, float] | None]:
        """Log-probabilities of the requests that ask for them, with a device-to-host copy of their own."""
        counts = {
            row: request.params.logprobs for row, request in enumerate(requests) if request.params.logprobs is not None
        }
        if not counts:
            return [None] * len(requests)
        self.host_sync.count += 1
        index = on_device(list(counts), logits.device, torch.long)
        found = log_probabilities(logits[index], tokens[index], list(counts.values()))
        by_row = dict(zip(counts, found, strict=True))
        return [by_row.get(row) for row in range(len(requests))]

    def _deliver_sampled(self) -> None:
        """Copy sampled tokens to the host and deliver them."""
        sampled, self._sampled = self._sampled, []
        if not sampled:
            return
        tokens = self.host_sync.fetch_tokens()
        for item, token in zip(sampled, tokens, strict=True):
            item.request.tokens[-1] = token
        self.deliver(zip(sampled, tokens, strict=True))
