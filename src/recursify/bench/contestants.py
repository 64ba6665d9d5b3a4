"""Contestants of a benchmark: the engine, and transformers' ``generate`` and ``generate_batch``.

All contestants get the same requests and take turns, so that a disturbance of the machine affects all of them. Only
requested tokens count, not what a static batch generates for rows that have ended.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig

from recursify.engine import Engine, EngineStats, RequestOutput, SamplingParams
from recursify.errors import EngineError

from .workload import Workload


@dataclass
class BenchRun:
    """Measurements of one run of a workload.

    Attributes:
        seconds: Duration of the run.
        latencies: Seconds to the end of each request.
        first_tokens: Seconds to the first token of each request; empty if tokens are not reported one by one.
        stats: Statistics of the engine; None for other contestants.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    stats: EngineStats | None = None


Runner = Callable[[Workload], BenchRun]
Params = Callable[[Workload, int], dict[str, Any]]
"""Callable that makes the further sampling parameters of a workload's request, by its number."""


@dataclass(frozen=True)
class Contestant:
    """A way to generate.

    Attributes:
        name: Name in results.
        run: Callable that runs a workload.
        is_simulation: True if it uses knowledge that a real run does not have.
        compiles: True if it compiles for each length, so that the entire workload is its warm-up.
    """

    name: str
    run: Runner
    is_simulation: bool = False
    compiles: bool = False


def choose_clock(device: torch.device) -> Callable[[], float]:
    """Return CPU time if one thread does all the work, since other processes disturb it less; else wall time."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time

    def wall_time() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall_time


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Let ``generate`` run without the model's own generation config, with which it would fill in what is not given:
    its EOS tokens would end requests early, and a penalty would be measured that the engine does not apply."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def generate_runner(model: Any, exit_policy: Any = None, **options: Any) -> Runner:
    """Make a runner of ``generate`` on static batches, padded on the left, until the longest request ends.

    ``options`` are further options of ``GenerationConfig``.
    """
    exits = {} if exit_policy is None else {"exit_policy": exit_policy}
    clock = choose_clock(model.device)

    def run(workload: Workload) -> BenchRun:
        started, latencies = clock(), []
        for start in range(0, len(workload.prompts), workload.concurrency):
            batch = slice(start, start + workload.concurrency)
            new, prompts = max(workload.new_tokens[batch]), [torch.tensor(ids) for ids in workload.prompts[batch]]
            inputs = pad_sequence(prompts, batch_first=True, padding_side="left").to(model.device)
            mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
            config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=None, **options)
            with plain_generation(model):
                model.generate(inputs, attention_mask=mask.to(model.device), generation_config=config, **exits)
            latencies += [clock() - started] * len(prompts)
        return BenchRun(clock() - started, latencies)

    return run


def generate_batch_runner(model: Any) -> Runner:
    """Make a runner of ``generate_batch``: transformers' continuous batching with a paged KV cache."""
    clock = choose_clock(model.device)

    def run(workload: Workload) -> BenchRun:
        new = max(workload.new_tokens)
        config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=-1)
        batching = {"generation_config": config, "continuous_batching_config": _batching_config(workload)}
        attention = model.config._attn_implementation
        try:
            with plain_generation(model), model.continuous_batching_context_manager(**batching) as manager:
                started = clock()
                for prompt, new in zip(workload.prompts, workload.new_tokens, strict=True):
                    manager.add_request(prompt, max_new_tokens=new)
                latencies: list[float] = []
                while len(latencies) < len(workload.prompts):
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        latencies.append(clock() - started)
                    elif not manager.is_running():
                        raise EngineError("transformers' generate_batch stopped before all requests had ended.")
                seconds = clock() - started
        finally:
            model.set_attn_implementation(attention)
        return BenchRun(seconds, latencies)

    return run


def _batching_config(workload: Workload) -> ContinuousBatchingConfig:
    """Configure enough pages, with the options that the installed transformers has."""
    known, size = inspect.signature(ContinuousBatchingConfig).parameters, workload.concurrency
    options = {"num_blocks": size * (-(-workload.context // 32) + 1), "max_batch_tokens": max(size, 256)}
    options |= {"page_size" if "page_size" in known else "block_size": 32, "max_requests_per_batch": size}
    return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})


class EngineRunner:
    """Runs workloads on the engine, without prefix caching.

    Args:
        model: Model to run.
        params: Further sampling parameters of each request.
        sync_phases: Wait for a GPU at the end of each phase of the engine, so that the times of phases are exact.
        options: Further options of the engine.
    """

    def __init__(self, model: Any, params: Params | None = None, *, sync_phases: bool = True, **options: Any) -> None:
        self.model, self.params, self.options = model, params or (lambda workload, number: {}), options
        self._engines: dict[int, Engine] = {}
        self._clock = choose_clock(model.device)
        self._engine_clock = self._clock if sync_phases or model.device.type != "cuda" else time.perf_counter

    def __call__(self, workload: Workload) -> BenchRun:
        engine, clock = self._engine(workload), self._engine_clock
        engine.clock = clock
        engine.reset_stats()
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        started, engine_started = self._clock(), clock()

        def record(output: RequestOutput) -> None:
            last[output.request_id] = clock() - engine_started
            first.setdefault(output.request_id, last[output.request_id])

        engine.on_token = record
        params = [
            SamplingParams(max_tokens=new, ignore_eos=True, **self.params(workload, number))
            for number, new in enumerate(workload.new_tokens)
        ]
        engine.generate(workload.prompts, params)
        seconds = self._clock() - started
        return BenchRun(seconds, list(last.values()), list(first.values()), replace(engine.stats))

    def _engine(self, workload: Workload) -> Engine:
        """Return the engine for the workload's concurrency, made at its first use."""
        concurrency = workload.concurrency
        if concurrency not in self._engines:
            self._engines[concurrency] = Engine(
                self.model,
                max_num_seqs=concurrency,
                num_pages=concurrency * (-(-workload.context // 16) + 1),
                max_num_batched_tokens=max(2048, 2 * concurrency),
                max_model_len=workload.context,
                enable_prefix_caching=False,
                **self.options,
            )
        return self._engines[concurrency]
