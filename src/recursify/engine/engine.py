"""Inference engine with continuous depth-wise batching (Relaxed Recursive Transformers, arXiv 2410.20672, section 3.3).

An iteration is **enter** (embedding and prelude, for newly scheduled tokens), **block** (one call of the shared block
for all rows, whatever their depths and positions), **test** (exit decisions), **exit** (coda, LM head and sampling, for
tokens that exited), and **advance**. An exited token frees its row at the next recursion, not at the next token of the
slowest row.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from recursify.checkpoint.generation_defaults import GenerationDefaults, eos_tokens
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import EngineError
from recursify.settings import resolve_settings

from . import checks
from .chunk import Chunk
from .config import EngineConfig
from .detokenizer import Detokenizer
from .device_loop.slot_manager import SlotManager
from .early_exit import EarlyExitStage
from .host_loop import HostLoop
from .host_sync import HostSync
from .layers.decoder import adapt_decoder
from .layers.kv_cache import KVCache, pages_that_fit
from .layers.model_runner import ModelRunner
from .page_pool import pages_for
from .request import FinishReason, Request, RequestOutput, SamplingParams
from .routing import RoutingStage
from .sampler import SampledToken
from .scheduler import Scheduler
from .stats import EngineStats

logger = logging.getLogger(__name__)


class Engine:
    """Generate text for many requests at once with one model.

    Args:
        model: Recursive model, or a dense one, which runs as one recursion. The engine uses its weights in place; they
            must not change while the prefix cache holds keys and values computed with them.
        tokenizer: Tokenizer for text prompts, output text and stop strings; not needed for token ids.
        config: Settings of the engine.
        on_token: Callback invoked with the :class:`RequestOutput` after every new token and at the end.
        **options: Fields of :class:`EngineConfig`, instead of ``config``.

    Attributes:
        clock: Clock of :class:`EngineStats`. A GPU runs asynchronously, so the time of a part of an iteration is the
            time that the host spent in it.

    Raises:
        EngineError: A setting is unknown, out of its range, or does not fit the model.
        UnsupportedModelError: The engine cannot run the model; the message names the reason.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        *,
        on_token: Callable[[RequestOutput], None] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, str | Path):
            raise EngineError(f"Engine takes a loaded model, got '{model}'. Use Engine.from_pretrained('{model}').")
        self.config = config = resolve_settings(EngineConfig, config, options)
        self.model, self.tokenizer, self.on_token = model.eval(), tokenizer, on_token
        self.clock = time.perf_counter
        with checks.refusing_by_name(model):
            self.decoder = adapt_decoder(model)
        self.kv = checks.choose_kv(self.decoder, config.kv, force=config.force_kv)
        context = getattr(model.config, "max_position_embeddings", None) or 2**20
        self.max_model_len = min(config.max_model_len or context, context)
        if (config.max_model_len or 0) > context:
            logger.warning(
                "Requests can have %d tokens, the model's context, and not %d.", context, config.max_model_len
            )
        self.decoder.limit_length(self.max_model_len)
        self.kv_cache = self._make_kv_cache()
        self.implementation = checks.choose_implementation(config.implementation, self.decoder)
        self.runner = ModelRunner(self.decoder, self.kv_cache, kernels=self.implementation == "triton")
        self.scheduler = Scheduler(self.kv_cache, config)
        self.eos = eos_tokens(model)
        self.host_sync = HostSync()
        self.slot_manager = self._make_slot_manager()
        stage: RoutingStage | EarlyExitStage = EarlyExitStage(self.runner, self.kv, self.host_sync)
        if self.decoder.is_routed:
            stage = RoutingStage(self.runner, self.host_sync)
        self.host_loop = HostLoop(
            self.runner, stage, self.scheduler, self.host_sync, async_output=self.async_output, deliver=self._deliver
        )
        self.requests: dict[int, Request] = {}
        self.reset_stats()
        with checks.refusing_by_name(model):
            checks.check_parity(self.runner)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
        on_token: Callable[[RequestOutput], None] | None = None,
        **options: Any,
    ) -> Self:
        """Load a model with its tokenizer, and create an engine for it.

        Args:
            source: Folder of a recursive or dense model, ``.gguf`` file, or Hub id.
            dtype: Data type of the weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the stored one.
            device: Device of the model.
            trust_remote_code: Permission to run code from a dense model's repository.
            on_token: Callback invoked with the :class:`RequestOutput` after every new token and at the end.
            **options: Fields of :class:`EngineConfig`.

        Raises:
            CheckpointError: The model cannot be loaded.
            EngineError: A setting is unknown, out of its range, or does not fit the model.
            SettingsError: ``dtype`` or ``device`` is unknown.
            UnsupportedModelError: The engine cannot run the model.
        """
        from recursify.checkpoint.loading import load_model

        config = EngineConfig(**options)  # before the model, which takes longer
        model, tokenizer = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, config, on_token=on_token)

    def _make_kv_cache(self) -> KVCache:
        config, num_pages = self.config, self.config.num_pages
        if num_pages is None:
            num_pages = pages_that_fit(config.kv_cache_memory_bytes, self.decoder, self.kv, config.page_size)
            num_pages = min(num_pages, config.max_num_seqs * pages_for(self.max_model_len, config.page_size))
        with torch.inference_mode():
            return KVCache(self.decoder, self.kv, config.page_size, num_pages, self.max_model_len)

    def _make_slot_manager(self) -> SlotManager | None:
        """Create the host side of the device loop, where the config or the device asks for it."""
        config = self.config
        obstacle = checks.loop_obstacle(self.decoder, lockstep=config.lockstep)
        if config.device_loop and obstacle:
            raise EngineError(f"The device loop does not support {obstacle}. Leave device_loop out.")
        is_faster = self.decoder.device.type == "cuda" and self.implementation == "triton"
        if not (config.device_loop or (config.device_loop is None and is_faster and not obstacle)):
            return None
        with torch.inference_mode():
            settings = (config.num_device_steps, self.implementation)
            return SlotManager(self.runner, self.kv, self.scheduler, self.eos, self.host_sync, *settings)

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """Sampling defaults of the model. Only callers apply them: parameters of a request are taken as they are."""
        return GenerationDefaults.of(self.model)

    @property
    def async_output(self) -> bool:
        """True if sampled tokens are copied to the host an iteration later, with its exit decisions."""
        if self.slot_manager is not None:
            return False
        chosen = self.config.async_output
        return self.decoder.device.type != "cpu" if chosen is None else chosen

    # --- Requests ------------------------------------------------------------------------------------------------

    def add(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a request and return its id. Calls of :meth:`step` run it.

        Raises:
            EngineError: The request can never run: it is too long, has no tokens, or asks for exits that the model does
                not have.
        """
        params = params or SamplingParams()
        vocab_size = self.decoder.config.vocab_size
        ids = checks.encode(prompt, self.tokenizer, vocab_size)
        require_known_tokens(params.stop_token_ids, vocab_size, name="stop_token_ids", error=EngineError)
        require_known_tokens(params.logit_bias, vocab_size, name="logit_bias", error=EngineError)
        settings = checks.exit_settings(params, self.decoder, self.kv)
        checks.check_fits(len(ids), params, self.max_model_len, self.kv_cache)
        if params.stop and self.tokenizer is None:
            raise EngineError("Stop strings need a tokenizer. Give the engine one, or use stop_token_ids.")
        detokenizer = Detokenizer(self.tokenizer, params.stop, skip_special_tokens=params.skip_special_tokens)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos)}
        request = Request(ids, params, settings, len(self.kv_cache.pools), detokenizer, ends)
        self.requests[request.id] = request
        self.scheduler.waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> bool:
        """End a request and free its pages; return whether the engine had it."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._finish(request, "cancelled")
        return True

    def generate(
        self, prompts: Iterable[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Run all ``prompts`` to their ends, and return their outputs in the same order.

        Args:
            prompts: Texts or token ids.
            params: Sampling parameters for all prompts, or a list with those of every prompt.

        Raises:
            EngineError: A prompt can never run; no prompt is run then.
        """
        prompts = list(prompts)
        all_params = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(all_params) != len(prompts):
            raise EngineError(
                f"There are {len(prompts)} prompts and {len(all_params)} params. Pass one params, or one per prompt."
            )
        outputs: list[RequestOutput] = []
        try:
            for prompt, prompt_params in zip(prompts, all_params, strict=True):
                outputs.append(self.requests[self.add(prompt, prompt_params)].output)
        except EngineError:
            for output in outputs:
                self.cancel(output.request_id)
            raise
        while not all(output.finished for output in outputs):
            self.step()
        return outputs

    @property
    def has_work(self) -> bool:
        """True if any request is unfinished."""
        return self.scheduler.has_work

    @property
    def depths(self) -> list[int]:
        """Depths of everything in progress: next tokens, and chunks of prompts."""
        depths = [chunk.depth for chunk in self.scheduler.chunks.values()]
        return depths if self.slot_manager is None else depths + self.slot_manager.depths

    # --- Iterations ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Run one iteration: every scheduled row advances by one recursion. The device loop runs several."""
        started, slot_manager = self.clock(), self.slot_manager
        chunks, new = self.scheduler.schedule()
        if slot_manager is not None:
            chunks, new = self._move_to_device(slot_manager, chunks, new)
        with self.decoder.in_use():
            if chunks or slot_manager is None:
                self.host_loop.iterate(chunks, new, self._stats, self.clock)
            if slot_manager is not None:
                self._run_device_loop(slot_manager, 1 if chunks else slot_manager.num_device_steps)
        self._stats.seconds += self.clock() - started

    def _move_to_device(
        self, slot_manager: SlotManager, chunks: list[Chunk], new: list[Chunk]
    ) -> tuple[list[Chunk], list[Chunk]]:
        """Hand new tokens that the device loop supports to it; return the other chunks, and the new ones of them."""
        slot_manager.release_ended()
        moved = set()
        for chunk in new:
            if chunk.is_new and slot_manager.can_admit(chunk.request):
                slot_manager.admit(self.scheduler.move_to_device(chunk))
                moved.add(chunk)
        return [chunk for chunk in chunks if chunk not in moved], [chunk for chunk in new if chunk not in moved]

    def _run_device_loop(self, slot_manager: SlotManager, times: int) -> None:
        """Run iterations of the device loop, and deliver the tokens generated in them."""
        stats, started, before = self._stats, self.clock(), slot_manager.counters
        replays = slot_manager.graphs.num_replays
        try:
            times = slot_manager.run(times, stats.mean_recursions if stats.new_tokens > 100 else 1.0)
            if not times:
                return
            generated = slot_manager.read_tokens()
        except BaseException:
            slot_manager.discard_unread()
            raise
        stats.iterations += times
        stats.loop_iterations += times
        stats.block_calls += times
        stats.slots += times * self.scheduler.max_num_seqs
        stats.slot_calls += slot_manager.counters.slot_calls - before.slot_calls
        stats.block_rows += slot_manager.counters.block_rows - before.block_rows
        stats.loop_waits += slot_manager.counters.waits - before.waits
        stats.graph_replays += slot_manager.graphs.num_replays - replays
        stats.kv_bytes = max(stats.kv_bytes, self.kv_cache.bytes_used())
        try:
            self._deliver(self._commit(*token) for token in generated)
        finally:
            stats.loop_seconds += self.clock() - started

    def _commit(self, request: Request, token: int, depth: int) -> tuple[SampledToken, int]:
        """Record a token of the device loop in its request."""
        if not request.finished:
            request.exit_depths.append(depth)
            request.computed += 1
            if self.kv == "deferred" and depth == self.decoder.num_depths - 1:
                request.full_until = request.computed
            request.tokens.append(token)
        return SampledToken(request, depth, None), token

    # --- Output --------------------------------------------------------------------------------------------------

    def _deliver(self, sampled: Iterable[tuple[SampledToken, int]]) -> None:
        """Append tokens to their outputs, in order; tokens after the end of a request are dropped."""
        errors: list[Exception] = []
        for item, token in sampled:
            try:
                if not item.request.finished:
                    self._append(item, token)
            except Exception as error:  # of on_token: an error for one request must not lose the others' tokens
                errors.append(error)
        if errors:
            raise errors[0]

    def _append(self, sampled: SampledToken, token: int) -> None:
        """Append ``token`` to its output, and finish the request if it is the last one."""
        request, params, output = sampled.request, sampled.request.params, sampled.request.output
        output.token_ids.append(token)
        output.depths.append(sampled.depth)
        if output.logprobs is not None and sampled.log_p is not None:
            output.logprobs.append(sampled.log_p)
        self._stats.count_token(sampled.depth)
        may_stop = len(output.token_ids) > params.min_tokens
        stops = token in request.ends or request.detokenizer.add(token, may_stop=may_stop)
        output.text = request.detokenizer.text
        if stops:
            self._finish(request, "stop")
        elif request.num_new >= params.max_tokens:
            self._finish(request, "length")
        elif self.on_token is not None:
            self.on_token(output)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if reason != "cancelled":
            request.detokenizer.finish()
            request.output.text = request.detokenizer.text
            self.scheduler.cache_full_pages(request)
        request.output.finish_reason = reason
        self.scheduler.remove(request)
        del self.requests[request.id]
        if self.on_token is not None:
            self.on_token(request.output)

    # --- Statistics ----------------------------------------------------------------------------------------------

    def reset_stats(self) -> None:
        """Start counting from zero."""
        self._stats = EngineStats(implementation=self.implementation)
        self._before = (self.host_sync.count, self.scheduler.preemptions, self.scheduler.cached_tokens)

    @property
    def stats(self) -> EngineStats:
        """Counters and timings, up to date."""
        fetches, preemptions, cached = self._before
        self._stats.fetches = self.host_sync.count - fetches
        self._stats.preemptions = self.scheduler.preemptions - preemptions
        self._stats.cached_tokens = self.scheduler.cached_tokens - cached
        return self._stats
