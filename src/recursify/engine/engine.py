"""The engine: continuous depth-wise batching (Relaxed Recursive Transformers, arXiv 2410.20672, section 3.3).

An iteration is **enter** (embedding and prelude, for tokens that begin), **block** (one call of the shared block for
all rows, whatever their depths and positions), **test** (who leaves), **exit** (coda, readout and sampling, for those),
and **advance**. A token that leaves makes room at the next recursion, not at the next token of the slowest row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recursify.errors import EngineError, UnsupportedModelError
from recursify.modeling import ExitSettings
from recursify.modeling.recursive_decoding import check_depths

from .boundaries import Boundaries
from .decoder_parts import DecoderParts, take_apart
from .flight import Departure, Flight
from .kv_pages import KVPages, pages_in
from .page_pool import pages_for
from .request import FinishReason, Request, RequestOutput, SamplingParams
from .routing import RoutedBoundaries
from .rows import Run
from .runner import Runner
from .sampler import log_probabilities, sample
from .scheduler import Scheduler
from .stops import StopChecker

KV_MODES = ("deferred", "copied", "latest", "recursion_wise", "shared")
"""Where keys and values of the depths that a token skips come from: of models with exits the first three
(:data:`~recursify.modeling.recursive_policies.KV_MODES`), of routed models the last two."""


@dataclass
class EngineStats:
    """What an engine has done since it was made, or :meth:`Engine.reset_stats`.

    Attributes:
        iterations: Of the loop.
        block_calls: Calls of the shared block.
        block_rows: Rows in them, prompts and tokens that were caught up included.
        slot_calls: Requests that had a row in a call, summed over calls.
        slots: Requests that could have had one: ``max_requests`` times the calls.
        new_tokens: Said.
        depth_sum: Of the recursions that new tokens ran, counting from 1.
        exit_histogram: By depth, how many new tokens were read after it.
        prompt_tokens: Tokens of prompts that were computed, again after a preemption.
        cached_tokens: Tokens of prompts that were found.
        preemptions: How often a request had to begin again.
        fetches: How often something was brought from the device: decisions, and tokens.
        seconds: In :meth:`Engine.step`, by the engine's clock; the next four are parts of it.
        enter_seconds: Embedding and prelude.
        block_seconds: The shared block.
        test_seconds: What is done between recursions: exit tests, routers, keys and values of skipped depths.
        exit_seconds: Coda, readout and sampling.
        kv_bytes: Of keys and values at most in use.
    """

    iterations: int = 0
    block_calls: int = 0
    block_rows: int = 0
    slot_calls: int = 0
    slots: int = 0
    new_tokens: int = 0
    depth_sum: int = 0
    exit_histogram: dict[int, int] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    fetches: int = 0
    seconds: float = 0.0
    enter_seconds: float = 0.0
    block_seconds: float = 0.0
    test_seconds: float = 0.0
    exit_seconds: float = 0.0
    kv_bytes: int = 0

    @property
    def mean_recursions(self) -> float:
        """Per new token."""
        return self.depth_sum / max(self.new_tokens, 1)

    @property
    def occupancy(self) -> float:
        """The part of the slots that calls of the block had rows of."""
        return self.slot_calls / max(self.slots, 1)


class Engine:
    """Answers many requests at once with one model.

    Args:
        model: A recursive model, or a dense one, which runs as one recursion. Its weights are used where they are.
        tokenizer: For prompts that are text, for the text of answers, and for stop strings.
        kv: Of :data:`KV_MODES`; None takes the mode that the model was trained for.
        force_kv: Allow another mode than that.
        max_requests: Requests that run at once.
        page_size: Tokens per page of keys and values.
        num_pages: Pages; None takes as many as ``kv_bytes`` hold.
        kv_bytes: See ``num_pages``.
        max_batch_tokens: Tokens of an iteration, as far as prompts are to blame.
        chunk_size: Tokens of a prompt that enter together.
        max_length: Tokens of a request, prompt and answer; None takes the model's context.
        prefix_caching: Take over keys and values of a known prefix, in whole pages. Not in routed models, where a page
            holds tokens that are not next to one another.
        synchronous: A control: rows wait for the deepest one before new tokens enter.
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
        max_requests: int = 32,
        page_size: int = 16,
        num_pages: int | None = None,
        kv_bytes: int = 2**30,
        max_batch_tokens: int = 2048,
        chunk_size: int = 512,
        max_length: int | None = None,
        prefix_caching: bool = True,
        synchronous: bool = False,
        on_token: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        limits = {
            "max_requests": max_requests,
            "page_size": page_size,
            "max_batch_tokens": max_batch_tokens,
            "chunk_size": chunk_size,
            **({} if num_pages is None else {"num_pages": num_pages}),
        }
        for name, value in limits.items():
            if value < 1:
                raise EngineError(f"{name} must be at least 1, got {value}.")
        if max_batch_tokens <= max_requests:
            raise EngineError(
                f"max_batch_tokens ({max_batch_tokens}) must be more than max_requests ({max_requests}), or no prompt "
                f"gets in beside their tokens."
            )
        self.model, self.tokenizer, self.on_token = model.eval(), tokenizer, on_token
        self.clock = time.perf_counter
        self.parts = take_apart(model)
        self.kv = choose_kv(self.parts, kv, force=force_kv)
        context = getattr(model.config, "max_position_embeddings", None) or 2**20
        self.max_length = context if max_length is None else min(max_length, context)
        if num_pages is None:
            num_pages = pages_in(kv_bytes, self.parts, self.kv, page_size)
            num_pages = min(num_pages, max_requests * pages_for(self.max_length, page_size))
        with torch.inference_mode():
            self.pages = KVPages(self.parts, self.kv, page_size, num_pages, self.max_length)
        self.runner = Runner(self.parts, self.pages)
        self.boundaries: Boundaries | RoutedBoundaries = (
            RoutedBoundaries(self.runner) if self.parts.is_routed else Boundaries(self.runner, self.kv)
        )
        self.scheduler = Scheduler(
            self.pages,
            max_requests=max_requests,
            max_batch_tokens=max_batch_tokens,
            chunk_size=chunk_size,
            prefix_caching=prefix_caching,
            synchronous=synchronous,
        )
        self.requests: dict[int, Request] = {}
        self.eos = _eos_tokens(model)
        self.reset_stats()
        self._check_parity()

    # --- Asking --------------------------------------------------------------------------------------------------

    def add(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a request; returns its id. It is answered by calls of :meth:`step`.

        Raises:
            EngineError: It can never be answered: too long, no tokens, or a policy that the model cannot follow.
        """
        params = params or SamplingParams()
        ids = self._encode(prompt)
        settings = self._settings(params)
        longest = len(ids) + params.max_tokens
        if longest > self.max_length:
            raise EngineError(
                f"The prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}: together more than the "
                f"{self.max_length} that a request can have. Shorten one of them."
            )
        pages, held = pages_for(longest, self.pages.page_size), min(pool.num_pages for pool in self.pages.pools)
        if pages > held:
            raise EngineError(
                f"The request needs {pages} pages for {longest} tokens, and the engine has {held} in all. Give it more "
                f"(num_pages, kv_bytes), or ask for less."
            )
        if params.stop and self.tokenizer is None:
            raise EngineError("Stop strings need a tokenizer. Give the engine one, or use stop_token_ids.")
        request = Request(ids, params, settings, len(self.pages.pools))
        request.text = StopChecker(self.tokenizer, params.stop)
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

    # --- An iteration --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """One iteration: every row that is under way advances by one recursion."""
        stats, started = self.stats, self.clock()
        flights, new = self.scheduler.schedule()
        with self.parts.in_use():
            entering = self.clock()
            self._enter(new)
            entered = self.clock()
            stats.enter_seconds += entered - entering
            self._run_block([flight for flight in flights if not flight.is_done])
            leaving = self.clock()
            self._exit([flight for flight in flights if flight.is_done])
        ended = self.clock()
        stats.exit_seconds += ended - leaving
        stats.iterations += 1
        stats.seconds += ended - started

    def _enter(self, flights: Sequence[Flight]) -> None:
        if not flights:
            return
        tokens = [token for flight in flights for token in flight.tokens]
        runs = [Run(flight.request, None, flight.positions) for flight in flights]
        embedded, states = self.runner.enter(tokens, runs)
        sizes = [len(flight.positions) for flight in flights]
        for flight, first, entering in zip(flights, embedded.split(sizes), states.split(sizes), strict=True):
            flight.embedded, flight.states = first[-1], entering
            self.stats.prompt_tokens += max(0, min(flight.stop, flight.request.prompt_length) - flight.start)
        self.boundaries.enter(flights)

    def _run_block(self, flights: Sequence[Flight]) -> None:
        if not flights:
            return
        flights = sorted(flights, key=lambda flight: flight.depth)
        runs = [Run(flight.request, flight.depth, flight.positions) for flight in flights]
        started = self.clock()
        states = self.runner.block(runs, torch.cat([flight.states for flight in flights]))
        ran = self.clock()
        for flight, made in zip(flights, states.split([len(run.positions) for run in runs]), strict=True):
            flight.states = made
        stats = self.stats
        stats.block_calls += 1
        stats.block_rows += len(states)
        stats.slot_calls += len(flights)
        stats.slots += self.scheduler.max_requests
        stats.kv_bytes = max(stats.kv_bytes, self.pages.bytes_used())
        stats.block_seconds += ran - started
        self.boundaries.pass_block(flights)
        stats.test_seconds += self.clock() - ran

    def _exit(self, flights: Sequence[Flight]) -> None:
        """Coda for all that have left, a new token for those whose last one has."""
        if not flights:
            return
        self._run_coda(flights)
        saying = [flight for flight in flights if flight.says]
        tokens: list[int] = []
        logged: list[dict[int, float] | None] = [None] * len(saying)
        if saying:
            logits = self._read(saying)
            chosen = sample(logits, [flight.request for flight in saying])
            self._log(logits, chosen, saying, logged)
            self.own_fetches += 1
            tokens = chosen.tolist()
        for flight in flights:
            request = flight.request
            for position in range(request.prompt_length + len(request.left), flight.stop):
                assert position == flight.stop - 1
                request.left.append(flight.last_departure().depth)
            self.scheduler.land(flight)
            if request.computed == request.prompt_length:
                self.scheduler.publish(request)
        for flight, token, log_p in zip(saying, tokens, logged, strict=True):
            self._say(flight, token, log_p)

    def _run_coda(self, flights: Sequence[Flight]) -> None:
        """Replace the states of departures by what the coda makes of them, where they run it."""
        departures: list[tuple[Flight, Departure]] = []
        for flight in flights:
            for departure in flight.departures:
                if departure.depth < self.parts.num_depths - 1 and not self._exits_run_coda:
                    continue
                if flight.exit_states is not None and len(departure.positions) == 1:
                    departure.states = flight.exit_states[None]
                    continue
                departures.append((flight, departure))
        if not departures or not self.parts.coda:
            return
        runs = [Run(flight.request, None, departure.positions) for flight, departure in departures]
        states = self.runner.coda(runs, torch.cat([departure.states for _, departure in departures]))
        sizes = [len(run.positions) for run in runs]
        for (_, departure), made in zip(departures, states.split(sizes), strict=True):
            departure.states = made

    @property
    def _exits_run_coda(self) -> bool:
        return self.parts.is_routed or getattr(self.parts.config, "exit_through_coda", True)

    def _read(self, flights: Sequence[Flight]) -> Tensor:
        """Logits ``[n, V]`` of the last tokens."""
        by_exit: dict[int | None, list[int]] = {}
        known: dict[int, Tensor] = {}
        last = [flight.last_departure() for flight in flights]
        for number, (flight, departure) in enumerate(zip(flights, last, strict=True)):
            if flight.exit_logits is not None:
                known[number] = flight.exit_logits
                continue
            exits = not self.parts.is_routed and departure.depth < self.parts.num_depths - 1
            by_exit.setdefault(departure.depth if exits and self._has_own_heads else None, []).append(number)
        rows: list[Tensor | None] = [known.get(number) for number in range(len(flights))]
        if len(by_exit) == 1 and not known:
            (depth,) = by_exit
            return self._read_at(depth, torch.stack([each.states[-1] for each in last]))
        for depth, numbers in by_exit.items():
            logits = self._read_at(depth, torch.stack([last[number].states[-1] for number in numbers]))
            for number, row in zip(numbers, logits, strict=True):
                rows[number] = row
        return torch.stack([row for row in rows if row is not None])

    @property
    def _has_own_heads(self) -> bool:
        """Whether exits read out with anything but the model's own norm and head."""
        return getattr(self.parts.config, "exit_head", None) not in (None, "shared")

    def _read_at(self, depth: int | None, states: Tensor) -> Tensor:
        return self.runner.read_out(states) if depth is None else self.runner.read_exit(depth, states)

    def _log(self, logits: Tensor, chosen: Tensor, flights: Sequence[Flight], logged: list) -> None:
        """Note log-probabilities for the requests that want them."""
        wanted = [number for number, flight in enumerate(flights) if flight.request.params.logprobs is not None]
        if not wanted:
            return
        most = max(flights[number].request.params.logprobs or 0 for number in wanted)
        found = log_probabilities(logits[wanted], chosen[wanted], most)
        self.own_fetches += 1
        for number, row in zip(wanted, found, strict=True):
            count = flights[number].request.params.logprobs or 0
            best = sorted(row, key=lambda token: -row[token])[:count]
            token = int(chosen[number])
            logged[number] = {each: row[each] for each in dict.fromkeys([*best, token])}

    # --- Answering -----------------------------------------------------------------------------------------------

    def _say(self, flight: Flight, token: int, log_p: dict[int, float] | None) -> None:
        request, params = flight.request, flight.request.params
        output, depth = request.output, flight.last_departure().depth
        request.tokens.append(token)
        output.token_ids.append(token)
        output.depths.append(depth)
        if output.logprobs is not None and log_p is not None:
            output.logprobs.append(log_p)
        stats = self.stats
        stats.new_tokens += 1
        stats.depth_sum += depth + 1
        assert stats.exit_histogram is not None
        stats.exit_histogram[depth] = stats.exit_histogram.get(depth, 0) + 1
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
            self.scheduler.publish(request)
        request.output.finish_reason = reason
        self.scheduler.remove(request)
        del self.requests[request.id]
        if self.on_token is not None:
            self.on_token(request.output)

    def reset_stats(self) -> None:
        """Begin to count anew."""
        self._stats = EngineStats(exit_histogram={})
        self.own_fetches = 0
        self._before = (self.boundaries.fetches, self.scheduler.preemptions, self.scheduler.cached_tokens)

    @property
    def stats(self) -> EngineStats:
        """Counts; those that others keep are up to date."""
        fetches, preemptions, cached = self._before
        self._stats.fetches = self.boundaries.fetches - fetches + self.own_fetches
        self._stats.preemptions = self.scheduler.preemptions - preemptions
        self._stats.cached_tokens = self.scheduler.cached_tokens - cached
        return self._stats

    # --- Checking ------------------------------------------------------------------------------------------------

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise EngineError("A prompt that is text needs a tokenizer. Give the engine one, or pass token ids.")
            prompt = self.tokenizer(prompt)["input_ids"]
        ids = list(map(int, prompt))
        if not ids:
            raise EngineError("The prompt has no tokens. Give at least one.")
        vocabulary = self.parts.config.vocab_size
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if wrong:
            raise EngineError(f"Token {wrong[0]} of the prompt is not in the vocabulary of {vocabulary}.")
        return ids

    def _settings(self, params: SamplingParams) -> ExitSettings | None:
        """How tokens of a request leave.

        Raises:
            EngineError: The model or the engine cannot do that.
        """
        num_exits = self.parts.num_depths - 1
        wants = params.exit is not None or params.max_depth is not None or params.forced_depths is not None
        if wants and (self.parts.is_routed or not num_exits):
            why = "has routers, which say how far a token goes" if self.parts.is_routed else "has no exits"
            raise EngineError(f"The model {why}. Leave exit, max_depth and forced_depths out.")
        if params.exit is None:
            return None
        try:
            settings = ExitSettings.of(params.exit, self.parts.config)
            if not hasattr(params.exit, "policy"):
                settings = replace(settings, kv=self.kv)
            check_depths(settings, num_exits)
            settings.policy.check_vocabulary(self.parts.config.vocab_size)
        except ValueError as error:
            raise EngineError(str(error)) from error
        if settings.kv != self.kv:
            raise EngineError(
                f"The exit settings have kv '{settings.kv}', and the engine '{self.kv}'. Use one of them."
            )
        if settings.layers is not None or settings.adapt is not None:
            raise EngineError(
                "The engine exits at recursion boundaries, at given thresholds: leave layers and adapt out."
            )
        if settings.policy.simulated:
            raise EngineError(
                f"Policy '{settings.policy.name}' is a simulation: it runs all depths to know where it could have "
                f"stopped. Use it with recursify generate."
            )
        if settings.policy.needs_head and self.model.exit_heads is None:
            raise EngineError(
                f"Policy '{settings.policy.name}' needs exit heads, and the model has none. Train them (recursify "
                f"uptrain --stage exits), or use policy 'confidence'."
            )
        return settings

    @torch.inference_mode()
    def _check_parity(self) -> None:
        """Raises:
        UnsupportedModelError: The parts do not add up to the model.
        """
        count = min(5, self.max_length - 1, self.pages.page_size * self.pages.pools[0].num_pages)
        ids = [token % self.parts.config.vocab_size for token in range(3, 3 + count)]
        if self.parts.is_routed or count < 1:
            return
        expected = self.model(torch.tensor([ids], device=self.parts.device), use_cache=False).logits[0, -1].float()
        request = Request(ids, SamplingParams(), None, len(self.pages.pools))
        self.pages.reserve(request, count)
        with self.parts.in_use():
            _, states = self.runner.enter(ids, [Run(request, None, range(count))])
            for depth in range(self.parts.num_depths):
                states = self.runner.block([Run(request, depth, range(count))], states)
            states = self.runner.coda([Run(request, None, range(count))], states)
            found = self.runner.read_out(states)[-1].float()
        self.pages.release(request)
        self.runner.block_calls = self.runner.block_rows = 0
        tolerance = 1e-3 if self.parts.dtype in (torch.float32, torch.float64) else 0.1
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= tolerance:
            raise UnsupportedModelError(
                f"The engine does not compute what this {self.parts.config.model_type} model does: logits differ by "
                f"{difference:.2g} of the largest. It does something outside its layers that the engine does not know."
            )


def choose_kv(parts: DecoderParts, kv: str | None, *, force: bool) -> str:
    """The mode of keys and values.

    Raises:
        EngineError: An unknown one, or one that the model was not trained for.
    """
    if kv is not None and kv not in KV_MODES:
        raise EngineError(f"Unknown kv '{kv}'. Use one of: {', '.join(KV_MODES)}.")
    trained = parts.config.router_kv if parts.is_routed else getattr(parts.config, "exit_kv", "deferred")
    if kv is None or kv == trained:
        return trained
    routed = ("recursion_wise", "shared")
    if (kv in routed) != parts.is_routed or parts.is_routed:
        raise EngineError(f"kv '{kv}' is not for this model, whose own is '{trained}'. Leave kv out.")
    if not force:
        raise EngineError(
            f"The model was trained with '{trained}' keys and values, and '{kv}' makes others where tokens leave "
            f"early. Leave kv out, or take what comes of it (force_kv)."
        )
    return kv


def _eos_tokens(model: Any) -> frozenset[int]:
    """The tokens with which the model ends a text."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    return frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])
