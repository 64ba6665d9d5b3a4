"""The engine: continuous depth-wise batching (Relaxed Recursive Transformers, arXiv 2410.20672, section 3.3).

An iteration is **enter** (embedding and prelude, for tokens that begin), **block** (one call of the shared block for
all rows, whatever their depths and positions), **test** (who leaves), **exit** (coda, readout and sampling, for those),
and **advance**. A token that leaves makes room at the next recursion, not at the next token of the slowest row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recursify.errors import EngineError
from recursify.kernels.dispatch import Implementation
from recursify.modeling.recursive_decoding import on_device

from .checks import check_parity, choose_implementation, choose_kv, encode, eos_tokens, exit_settings, loop_obstacle
from .chunk import Chunk
from .detokenizer import Detokenizer
from .device_loop.slot_manager import SlotManager
from .early_exit import EarlyExitStage
from .host_sync import HostSync
from .layers.batch import TokenSpan
from .layers.decoder import adapt_decoder
from .layers.kv_cache import KVCache, pages_that_fit
from .layers.model_runner import ModelRunner
from .logits import LogitsHead
from .page_pool import pages_for
from .request import UNREAD, FinishReason, Request, RequestOutput, SamplingParams
from .routing import RoutingStage
from .sampler import log_probabilities, sample
from .scheduler import Scheduler


@dataclass
class EngineStats:
    """What an engine has done since it was made, or :meth:`Engine.reset_stats`.

    Attributes:
        iterations: Of the loop.
        block_calls: Calls of the shared block.
        block_rows: Rows in them, prompts and tokens that were caught up included.
        slot_calls: Requests that had a row in a call, summed over calls.
        slots: Requests that could have had one: ``max_num_seqs`` times the calls.
        new_tokens: Said.
        depth_sum: Of the recursions that new tokens ran, counting from 1.
        exit_histogram: By depth, how many new tokens were read after it.
        prompt_tokens: Tokens of prompts that were computed, again after a preemption.
        cached_tokens: Tokens of prompts that were found.
        preemptions: How often a request had to begin again.
        fetches: How often something was brought from the device: decisions, and tokens.
        seconds: In :meth:`Engine.step`, by the engine's clock; the next five are parts of it.
        enter_seconds: Embedding and prelude.
        block_seconds: The shared block.
        test_seconds: What is done between recursions: exit tests, routers, keys and values of skipped depths.
        exit_seconds: Coda, readout and sampling.
        loop_seconds: Iterations on the device, and reading what was said in them.
        loop_iterations: Of ``iterations``, those on the device.
        loop_waits: Rows that had to wait for an iteration there, because it had no room for them.
        graph_replays: Of CUDA graphs, up to three per iteration.
        implementation: Of the kernels: ``triton``, or ``reference`` for PyTorch.
        kv_bytes: Of keys and values at most in use.
    """

    iterations: int = 0
    block_calls: int = 0
    block_rows: int = 0
    slot_calls: int = 0
    slots: int = 0
    new_tokens: int = 0
    depth_sum: int = 0
    exit_histogram: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    fetches: int = 0
    seconds: float = 0.0
    enter_seconds: float = 0.0
    block_seconds: float = 0.0
    test_seconds: float = 0.0
    exit_seconds: float = 0.0
    loop_seconds: float = 0.0
    loop_iterations: int = 0
    loop_waits: int = 0
    graph_replays: int = 0
    implementation: str = "reference"
    kv_bytes: int = 0

    def count_token(self, depth: int) -> None:
        """A new token was read after ``depth``."""
        self.new_tokens += 1
        self.depth_sum += depth + 1
        self.exit_histogram[depth] = self.exit_histogram.get(depth, 0) + 1

    @property
    def mean_recursions(self) -> float:
        """Per new token."""
        return self.depth_sum / max(self.new_tokens, 1)

    @property
    def occupancy(self) -> float:
        """The part of the slots that calls of the block had rows of."""
        return self.slot_calls / max(self.slots, 1)


@dataclass(frozen=True)
class SampledToken:
    """A token that was read out; which one, the device knows.

    Attributes:
        request: Whose.
        depth: That it was read after.
        log_p: Log-probabilities, if the request wants them.
    """

    request: Request
    depth: int
    log_p: dict[int, float] | None


class Engine:
    """Answers many requests at once with one model.

    Args:
        model: A recursive model, or a dense one, which runs as one recursion. Its weights are used where they are, and
            must not change while keys and values that they made are known as prefixes.
        tokenizer: For prompts that are text, for the text of answers, and for stop strings.
        kv: Of :data:`~recursify.engine.KV_MODES`; None takes the mode that the model was trained for.
        force_kv: Allow another mode than that.
        max_num_seqs: Requests that run at once.
        page_size: Tokens per page of keys and values.
        num_pages: Pages; None takes as many as ``kv_cache_memory_bytes`` hold.
        kv_cache_memory_bytes: See ``num_pages``.
        max_num_batched_tokens: Tokens of an iteration, as far as prompts are to blame.
        chunk_size: Tokens of a prompt that enter together.
        max_model_len: Tokens of a request, prompt and answer; None takes the model's context.
        enable_prefix_caching: Reuse of the keys and values of a known prefix, in whole pages. Not in routed models,
            where a page holds tokens that are not next to one another.
        lockstep: A control: rows wait for the deepest one before new tokens enter.
        async_output: Fetch tokens together with the next iteration's decisions, so that the host waits once per
            iteration; a token after the last one of a text is then begun for nothing. None: where there is a device to
            wait for.
        implementation: Of the kernels (:mod:`recursify.kernels.dispatch`). ``auto`` takes Triton on GPUs that have
            bfloat16, and says so in ``stats``.
        device_loop: Run new tokens on the device, without the host deciding anything in between (``device_loop.py``),
            as CUDA graphs where there is a GPU. None: where kernels are Triton's on a GPU, of models that can.
            ``async_output`` is off then.
        num_device_steps: Iterations of that loop between two synchronizations with the host. More cost less, and notice
            the end of a text later.
        on_token: Called with a request's output whenever a token has come, or it has ended.

    Attributes:
        clock: What :class:`EngineStats` are timed with. On a GPU, which works on while the host goes ahead, parts of an
            iteration are not what their names say.

    Raises:
        EngineError: A limit of 0, no room for a page, or a mode that is not the model's.
        UnsupportedModelError: A model that the engine cannot run; the message names what is in the way.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        kv: str | None = None,
        force_kv: bool = False,
        max_num_seqs: int = 32,
        page_size: int = 16,
        num_pages: int | None = None,
        kv_cache_memory_bytes: int = 2**30,
        max_num_batched_tokens: int = 2048,
        chunk_size: int = 512,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        lockstep: bool = False,
        async_output: bool | None = None,
        implementation: Implementation = "auto",
        device_loop: bool | None = None,
        num_device_steps: int = 8,
        on_token: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        limits = {
            "max_num_seqs": max_num_seqs,
            "page_size": page_size,
            "max_num_batched_tokens": max_num_batched_tokens,
            "chunk_size": chunk_size,
            "num_device_steps": num_device_steps,
            **({} if num_pages is None else {"num_pages": num_pages}),
            **({} if max_model_len is None else {"max_model_len": max_model_len}),
        }
        for name, value in limits.items():
            if value < 1:
                raise EngineError(f"{name} must be at least 1, got {value}.")
        if max_num_batched_tokens <= max_num_seqs:
            raise EngineError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be more than max_num_seqs ({max_num_seqs}), "
                f"or no prompt gets in beside their tokens."
            )
        self.model, self.tokenizer, self.on_token = model.eval(), tokenizer, on_token
        self.clock = time.perf_counter
        self.decoder = adapt_decoder(model)
        self.kv = choose_kv(self.decoder, kv, force=force_kv)
        context = getattr(model.config, "max_position_embeddings", None) or 2**20
        self.max_model_len = context if max_model_len is None else min(max_model_len, context)
        if num_pages is None:
            num_pages = pages_that_fit(kv_cache_memory_bytes, self.decoder, self.kv, page_size)
            num_pages = min(num_pages, max_num_seqs * pages_for(self.max_model_len, page_size))
        with torch.inference_mode():
            self.kv_cache = KVCache(self.decoder, self.kv, page_size, num_pages, self.max_model_len)
        self.implementation = choose_implementation(implementation, self.decoder)
        self.runner = ModelRunner(self.decoder, self.kv_cache, kernels=self.implementation == "triton")
        self.host_sync = HostSync()
        self.stage: EarlyExitStage | RoutingStage = (
            RoutingStage(self.runner, self.host_sync)
            if self.decoder.is_routed
            else EarlyExitStage(self.runner, self.kv, self.host_sync)
        )
        self.async_output = self.decoder.device.type != "cpu" if async_output is None else async_output
        self.scheduler = Scheduler(
            self.kv_cache,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunk_size=chunk_size,
            enable_prefix_caching=enable_prefix_caching,
            lockstep=lockstep,
        )
        self.requests: dict[int, Request] = {}
        self.logits_head = LogitsHead(self.runner)
        self.eos = eos_tokens(model)
        self.slot_manager: SlotManager | None = None
        obstacle = loop_obstacle(self.decoder, lockstep=lockstep)
        if device_loop and obstacle:
            raise EngineError(f"The loop on the device cannot run {obstacle}. Leave device_loop out.")
        pays = self.decoder.device.type == "cuda" and self.implementation == "triton"
        if device_loop or (device_loop is None and pays and not obstacle):
            self.async_output = False
            with torch.inference_mode():
                self.slot_manager = SlotManager(
                    self.runner, self.kv, self.scheduler, self.eos, num_device_steps, self.implementation
                )
        self._said: list[SampledToken] = []
        self.reset_stats()
        check_parity(self.runner)

    # --- Asking --------------------------------------------------------------------------------------------------

    def add(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a request; returns its id. It is answered by calls of :meth:`step`.

        Raises:
            EngineError: It can never be answered: too long, no tokens, or a policy that the model cannot follow.
        """
        params = params or SamplingParams()
        ids = encode(prompt, self.tokenizer, self.decoder.config.vocab_size)
        settings = exit_settings(params, self.decoder, self.kv)
        longest = len(ids) + params.max_tokens
        if longest > self.max_model_len:
            raise EngineError(
                f"The prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}: together more than the "
                f"{self.max_model_len} that a request can have. Shorten one of them."
            )
        pages, held = pages_for(longest, self.kv_cache.page_size), min(pool.num_pages for pool in self.kv_cache.pools)
        if pages > held:
            raise EngineError(
                f"The request needs {pages} pages for {longest} tokens, and the engine has {held} in all. Give it more "
                f"(num_pages, kv_cache_memory_bytes), or ask for less."
            )
        if params.stop and self.tokenizer is None:
            raise EngineError("Stop strings need a tokenizer. Give the engine one, or use stop_token_ids.")
        request = Request(ids, params, settings, len(self.kv_cache.pools))
        request.text = Detokenizer(self.tokenizer, params.stop)
        self.requests[request.id] = request
        self.scheduler.waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> bool:
        """End a request wherever it is, and take its pages back; whether there was such a one."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._finish(request, "cancelled")
        return True

    def generate(
        self, prompts: Iterable[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer all ``prompts``, in their order.

        Args:
            prompts: Texts or token ids.
            params: For all, or one for each.

        Raises:
            EngineError: One of them can never be answered; none is, then.
        """
        prompts = list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise EngineError(f"There are {len(prompts)} prompts and {len(each)} params. Give one, or one for each.")
        outputs: list[RequestOutput] = []
        try:
            for prompt, its in zip(prompts, each, strict=True):
                outputs.append(self.requests[self.add(prompt, its)].output)
        except EngineError:
            for output in outputs:
                self.cancel(output.request_id)
            raise
        while not all(output.finished for output in outputs):
            self.step()
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether any request is not answered yet."""
        return self.scheduler.has_work

    @property
    def depths(self) -> list[int]:
        """Of all that is under way: the recursion that a request's token, or a part of its prompt, is in."""
        here = [chunk.depth for chunk in self.scheduler.chunks.values()]
        return here if self.slot_manager is None else here + self.slot_manager.depths

    # --- An iteration --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """One iteration: every row that is under way advances by one recursion."""
        stats, started = self.stats, self.clock()
        chunks, new = self.scheduler.schedule()
        if self.slot_manager is not None:
            chunks, new = self._settle(self.slot_manager, chunks, new)
        with self.decoder.in_use():
            if chunks or self.slot_manager is None:
                self._iterate(chunks, new)
            if self.slot_manager is not None:
                self._run_device_loop(self.slot_manager, 1 if chunks else self.slot_manager.num_device_steps)
        stats.seconds += self.clock() - started

    def _iterate(self, chunks: Sequence[Chunk], new: Sequence[Chunk]) -> None:
        stats = self.stats
        entering = self.clock()
        self._enter(new)
        entered = self.clock()
        stats.enter_seconds += entered - entering
        self._run_block([chunk for chunk in chunks if not chunk.is_done])
        leaving = self.clock()
        self._say()  # what was read out an iteration ago, where that has waited
        self._exit([chunk for chunk in chunks if chunk.is_done and not chunk.request.finished])
        if not self.async_output:
            self._say()
        stats.exit_seconds += self.clock() - leaving
        stats.iterations += 1

    def _enter(self, chunks: Sequence[Chunk]) -> None:
        if not chunks:
            return
        tokens = [token for chunk in chunks for token in chunk.tokens]
        ids = on_device(tokens, self.decoder.device, torch.long)
        unread = [row for row, token in enumerate(tokens) if token == UNREAD]
        if unread:
            said = {each.request.id: number for number, each in enumerate(self._said)}
            owners = [chunk.request.id for chunk in chunks for _ in chunk.tokens]
            places = on_device([unread, [said[owners[row]] for row in unread]], self.decoder.device)
            assert self.host_sync.pending is not None
            ids[places[0]] = self.host_sync.pending[places[1]]
        runs = [TokenSpan(chunk.request, None, chunk.positions) for chunk in chunks]
        embedded, states = self.runner.enter(ids, runs)
        sizes = [len(chunk.positions) for chunk in chunks]
        for chunk, first, entering in zip(chunks, embedded.split(sizes), states.split(sizes), strict=True):
            chunk.embedded, chunk.states = first[-1], entering
            self.stats.prompt_tokens += max(0, min(chunk.stop, chunk.request.prompt_length) - chunk.start)
        self.stage.enter(chunks)

    def _run_block(self, chunks: Sequence[Chunk]) -> None:
        if not chunks:
            return
        chunks = sorted(chunks, key=lambda chunk: chunk.depth)
        runs = [TokenSpan(chunk.request, chunk.depth, chunk.positions) for chunk in chunks]
        started = self.clock()
        states = self.runner.block(runs, torch.cat([chunk.states for chunk in chunks]))
        ran = self.clock()
        for chunk, made in zip(chunks, states.split([len(run.positions) for run in runs]), strict=True):
            chunk.states = made
        stats = self.stats
        stats.block_calls += 1
        stats.block_rows += len(states)
        stats.slot_calls += len(chunks)
        stats.slots += self.scheduler.max_num_seqs
        stats.kv_bytes = max(stats.kv_bytes, self.kv_cache.bytes_used())
        stats.block_seconds += ran - started
        self.stage.pass_block(chunks)
        stats.test_seconds += self.clock() - ran

    def _exit(self, chunks: Sequence[Chunk]) -> None:
        """Coda for all that have left, a new token for those whose last one has."""
        if not chunks:
            return
        self.logits_head.run_coda(chunks)
        saying = [chunk for chunk in chunks if chunk.samples_token]
        if saying:
            requests = [chunk.request for chunk in saying]
            logits = self.logits_head.logits(saying)
            tokens = sample(logits, requests)
            logged = self._log(logits, tokens, requests)
            self.host_sync.defer(tokens)
            self._said = [
                SampledToken(chunk.request, chunk.last_exited().depth, log_p)
                for chunk, log_p in zip(saying, logged, strict=True)
            ]
        for chunk in chunks:
            request = chunk.request
            if chunk.is_new:
                request.exit_depths.append(chunk.last_exited().depth)
            self.scheduler.commit(chunk)
            if request.computed == request.prompt_length:
                self.scheduler.cache_full_pages(request)
        for each in self._said:
            each.request.tokens.append(UNREAD)

    def _log(self, logits: Tensor, tokens: Tensor, requests: Sequence[Request]) -> Sequence[dict[int, float] | None]:
        """Log-probabilities of the requests that want them; a fetch of its own."""
        wanted = {
            number: request.params.logprobs
            for number, request in enumerate(requests)
            if request.params.logprobs is not None
        }
        if not wanted:
            return [None] * len(requests)
        self.host_sync.count += 1
        index = on_device(list(wanted), logits.device, torch.long)
        found = log_probabilities(logits[index], tokens[index], list(wanted.values()))
        by_number = dict(zip(wanted, found, strict=True))
        return [by_number.get(number) for number in range(len(requests))]

    # --- On the device -------------------------------------------------------------------------------------------

    def _settle(self, residents: SlotManager, chunks: list[Chunk], new: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
        """Have tokens that can begin on the device do so; returns the other flights, and the new ones among them."""
        residents.release_ended()
        settled = set()
        for chunk in new:
            if chunk.is_new and residents.can_admit(chunk.request):
                residents.admit(self.scheduler.move_to_device(chunk))
                settled.add(chunk)
        return [each for each in chunks if each not in settled], [each for each in new if each not in settled]

    def _run_device_loop(self, residents: SlotManager, times: int) -> None:
        """Iterations on the device, and what was said in them."""
        stats, started = self.stats, self.clock()
        counters = residents.counters
        replays, looks = residents.graphs.num_replays, residents.num_syncs
        try:
            times = residents.run(times, stats.mean_recursions if stats.new_tokens > 100 else 1.0)
            if not times:
                return
            said = residents.read_tokens()
        except BaseException:
            residents.discard_unread()
            raise
        self.host_sync.count += residents.num_syncs - looks
        stats.iterations += times
        stats.loop_iterations += times
        stats.block_calls += times
        stats.slots += times * self.scheduler.max_num_seqs
        stats.slot_calls += residents.counters.slot_calls - counters.slot_calls
        stats.block_rows += residents.counters.block_rows - counters.block_rows
        stats.loop_waits += residents.counters.waits - counters.waits
        stats.graph_replays += residents.graphs.num_replays - replays
        stats.kv_bytes = max(stats.kv_bytes, self.kv_cache.bytes_used())
        try:
            self._take_all(map(self._land, said))
        finally:
            stats.loop_seconds += self.clock() - started

    def _land(self, said: tuple[Request, int, int]) -> tuple[SampledToken, int]:
        """A token that was said on the device, as the host has it."""
        request, token, depth = said
        if not request.finished:
            request.exit_depths.append(depth)
            request.computed += 1
            if self.kv == "deferred" and depth == self.decoder.num_depths - 1:
                request.full_until = request.computed
            request.tokens.append(token)
        return SampledToken(request, depth, None), token

    # --- Answering -----------------------------------------------------------------------------------------------

    def _say(self) -> None:
        """Give tokens that were read out to their requests."""
        said, self._said = self._said, []
        if not said:
            return
        tokens = self.host_sync.fetch_tokens()
        for each, token in zip(said, tokens, strict=True):
            each.request.tokens[-1] = token
        self._take_all(zip(said, tokens, strict=True))

    def _take_all(self, said: Iterable[tuple[SampledToken, int]]) -> None:
        """Give tokens to their requests, one after the other: what follows the end of a text is dropped."""
        heard: list[Exception] = []
        for each, token in said:
            try:
                if not each.request.finished:
                    self._take(each, token)
            except Exception as error:  # of on_token: one listener's error is not to lose the others' tokens
                heard.append(error)
        if heard:
            raise heard[0]

    def _take(self, said: SampledToken, token: int) -> None:
        request, params, output = said.request, said.request.params, said.request.output
        output.token_ids.append(token)
        output.depths.append(said.depth)
        if output.logprobs is not None and said.log_p is not None:
            output.logprobs.append(said.log_p)
        self.stats.count_token(said.depth)
        ends = token in params.stop_token_ids or (token in self.eos and not params.ignore_eos)
        ends |= request.text.add(token)
        output.text = request.text.text
        if ends:
            self._finish(request, "stop")
        elif request.num_new >= params.max_tokens:
            self._finish(request, "length")
        elif self.on_token is not None:
            self.on_token(output)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if reason != "cancelled":
            request.text.finish()
            request.output.text = request.text.text
            self.scheduler.cache_full_pages(request)
        request.output.finish_reason = reason
        self.scheduler.remove(request)
        del self.requests[request.id]
        if self.on_token is not None:
            self.on_token(request.output)

    def reset_stats(self) -> None:
        """Begin to count anew."""
        self._stats = EngineStats(implementation=self.implementation)
        self._before = (self.host_sync.count, self.scheduler.preemptions, self.scheduler.cached_tokens)

    @property
    def stats(self) -> EngineStats:
        """Counts; those that others keep are up to date."""
        fetches, preemptions, cached = self._before
        self._stats.fetches = self.host_sync.count - fetches
        self._stats.preemptions = self.scheduler.preemptions - preemptions
        self._stats.cached_tokens = self.scheduler.cached_tokens - cached
        return self._stats
