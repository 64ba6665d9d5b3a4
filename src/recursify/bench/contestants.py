"""How fast a model answers, by the engine and by others, in one process and in turns.

All contestants get the same requests. Rounds are interleaved, so that what disturbs the machine disturbs all of them,
and the median over rounds counts. Tokens are those that were asked for: what a static batch makes of rows that have
ended does not count.
"""

from __future__ import annotations

import inspect
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from recursify.engine.engine import Engine
from recursify.engine.request import SamplingParams
from recursify.errors import EngineError

from .ideal import Costs, ideal_gain, ideal_gain_per_call


@dataclass(frozen=True)
class Workload:
    """Requests, all there from the start.

    Attributes:
        prompts: Token ids.
        new_tokens: Per prompt, how many to write; no token ends an answer before.
        concurrency: Requests that may run at once.
        context: Tokens of the longest request.
    """

    prompts: list[list[int]]
    new_tokens: list[int]
    concurrency: int
    context: int

    @property
    def total(self) -> int:
        return sum(self.new_tokens)

    def with_answers_of(self, new: int) -> Workload:
        """The same prompts, answered with ``new`` tokens each."""
        return replace(self, new_tokens=[new] * len(self.prompts))

    @classmethod
    def draw(
        cls, sources: Sequence[Sequence[int]], concurrency: int, count: int, new: int, *, even: bool, seed: int
    ) -> Workload:
        """``count`` requests whose prompts are beginnings of ``sources``, and whose answers have ``new`` tokens.

        Unless they are to be ``even``, prompts have half to all of the tokens of their source and answers ``new / 4``
        to ``7 new / 4``, as answers differ in use.
        """
        draw = random.Random(seed)
        prompts, lengths = [], []
        for number in range(count):
            source = list(sources[number % len(sources)])
            keep = len(source) if even else draw.randint(max(1, len(source) // 2), len(source))
            prompts.append(source[:keep])
            lengths.append(new if even else draw.randint(max(1, new // 4), max(1, 7 * new // 4)))
        return cls(prompts, lengths, concurrency, max(map(len, sources)) + 7 * new // 4 + 1)


@dataclass
class Measured:
    """One run.

    Attributes:
        seconds: For all requests.
        facts: Of an engine: its counts.
        latencies: Seconds until each request was answered.
        first_tokens: Seconds until each request's first token; empty where tokens do not come one by one.
    """

    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Contestant:
    """A way to answer.

    Attributes:
        name: Of the row.
        run: Answers a workload.
        is_simulation: Whether it knows what no real one could.
        compiles: Whether it compiles for the lengths it meets, and so warms up on the whole workload.
    """

    name: str
    run: Callable[[Workload], Measured]
    is_simulation: bool = False
    compiles: bool = False


def choose_clock(device: torch.device) -> Callable[[], float]:
    """Processor time where one thread does all the work, which other processes disturb less; else the wall's."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time

    def wall() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


# --- transformers --------------------------------------------------------------------------------------------------


def static_batches(model: Any, exit_policy: Any = None, **arguments: Any) -> Callable[[Workload], Measured]:
    """``generate`` on batches of as many prompts as may run at once, padded on the left, to the longest answer.

    Args:
        model: To generate with.
        exit_policy: Of a recursive model, for tokens that leave early.
        arguments: More of ``GenerationConfig``.
    """
    leaving = {} if exit_policy is None else {"exit_policy": exit_policy}
    clock = choose_clock(model.device)

    def run(workload: Workload) -> Measured:
        started, latencies = clock(), []
        for start in range(0, len(workload.prompts), workload.concurrency):
            part = slice(start, start + workload.concurrency)
            new = max(workload.new_tokens[part])
            config = GenerationConfig(
                do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=None, **arguments
            )
            model.generate(**_pad(workload.prompts[part], model.device), generation_config=config, **leaving)
            latencies += [clock() - started] * len(workload.prompts[part])
        return Measured(clock() - started, latencies=latencies)

    return run


def _pad(prompts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def continuous_batches(model: Any) -> Callable[[Workload], Measured]:
    """transformers' ``generate_batch``: continuous batching over pages, one token per step for every row."""
    clock = choose_clock(model.device)

    def run(workload: Workload) -> Measured:
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(workload.new_tokens), pad_token_id=0, eos_token_id=-1
        )
        pages = ContinuousBatchingConfig(**_page_arguments(workload))
        before = model.config._attn_implementation
        try:
            with model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=pages
            ) as manager:
                started = clock()
                for prompt, new in zip(workload.prompts, workload.new_tokens, strict=True):
                    manager.add_request(prompt, max_new_tokens=new)
                latencies: list[float] = []
                while len(latencies) < len(workload.prompts):
                    answer = manager.get_result(timeout=1)
                    if answer is not None and answer.is_finished():
                        latencies.append(clock() - started)
                    elif not manager.is_running():
                        raise EngineError("transformers' generate_batch stopped before it had answered.")
                seconds = clock() - started
        finally:
            model.set_attn_implementation(before)
        return Measured(seconds, latencies=latencies)

    return run


def _page_arguments(workload: Workload) -> dict[str, int]:
    """Pages for the workload, by the names that the installed transformers has for them."""
    known = inspect.signature(ContinuousBatchingConfig).parameters
    size = "page_size" if "page_size" in known else "block_size"
    wanted = {
        size: 32,
        "num_blocks": workload.concurrency * (-(-workload.context // 32) + 1),
        "max_num_batched_tokens": max(workload.concurrency, 256),
        "max_requests_per_batch": workload.concurrency,
    }
    return {name: value for name, value in wanted.items() if name in known}


# --- The engine ----------------------------------------------------------------------------------------------------


def by_engine(
    model: Any,
    params: Callable[[int], dict[str, Any]] = lambda number: {},
    *,
    in_phases: bool = True,
    **arguments: Any,
) -> Callable[[Workload], Measured]:
    """The engine. A known prefix is not taken over.

    Args:
        model: To run.
        params: Makes what a request, by its number, has beside its length.
        in_phases: Have the engine's phases timed as they are; on a GPU it waits for it at the end of each, then.
        arguments: Of the engine.
    """
    engines: dict[int, Engine] = {}
    clock = choose_clock(model.device)
    inside = clock if in_phases or model.device.type != "cuda" else time.perf_counter

    def run(workload: Workload) -> Measured:
        if workload.concurrency not in engines:
            engines[workload.concurrency] = Engine(
                model,
                max_num_seqs=workload.concurrency,
                num_pages=workload.concurrency * (-(-workload.context // 16) + 1),
                max_num_batched_tokens=max(2048, 2 * workload.concurrency),
                max_model_len=workload.context,
                enable_prefix_caching=False,
                **arguments,
            )
        engine = engines[workload.concurrency]
        engine.clock = inside
        engine.reset_stats()
        started, began = clock(), inside()
        first: dict[int, float] = {}
        last: dict[int, float] = {}

        def note(output: Any) -> None:
            last[output.request_id] = inside() - began
            first.setdefault(output.request_id, last[output.request_id])

        engine.on_token = note
        engine.generate(
            workload.prompts,
            [
                SamplingParams(max_tokens=new, ignore_eos=True, **params(number))
                for number, new in enumerate(workload.new_tokens)
            ],
        )
        seconds = clock() - started
        stats = engine.stats
        facts = {
            "mean_recursions": stats.mean_recursions,
            "block_calls": stats.block_calls,
            "block_rows": stats.block_rows,
            "occupancy": stats.occupancy,
            "kv_bytes": stats.kv_bytes,
            "fetches_per_iteration": stats.fetches / max(stats.iterations, 1),
            "enter_seconds": stats.enter_seconds,
            "block_seconds": stats.block_seconds,
            "test_seconds": stats.test_seconds,
            "exit_seconds": stats.exit_seconds,
            "seconds": stats.seconds,
            "loop_seconds": stats.loop_seconds,
            "loop_iterations": stats.loop_iterations,
            "graph_replays": stats.graph_replays,
            "implementation": stats.implementation,
            "new_tokens": stats.new_tokens,
            "recursions": stats.depth_sum,
        }
        return Measured(seconds, facts, list(last.values()), list(first.values()))

    return run


def forced_table(parts: Sequence[float], count: int, seed: int) -> tuple[int, ...]:
    """Depths of ``count`` tokens, of which ``parts[d]`` leave after recursion ``d``, in an order that is drawn.

    Raises:
        EngineError: The parts do not add up to 1.
    """
    if abs(sum(parts) - 1) > 1e-6 or min(parts) < 0:
        raise EngineError(f"The parts of tokens that leave at each depth must add up to 1, got {list(parts)}.")
    depths = [depth for depth, part in enumerate(parts) for _ in range(round(part * count))][:count]
    depths += [len(parts) - 1] * (count - len(depths))
    random.Random(seed).shuffle(depths)
    return tuple(depths)


# --- The bench -----------------------------------------------------------------------------------------------------


def run_bench(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """A row per contestant and workload: the median over ``rounds``, after one short run that does not count."""
    rows = []
    total, done = len(workloads) * len(contestants) * (rounds + 1), 0
    for workload in workloads:
        runs: dict[str, list[Measured]] = {each.name: [] for each in contestants}
        for number in range(rounds + 1):
            for each in contestants:
                measured = each.run(workload if number or each.compiles else workload.with_answers_of(2))
                if number:
                    runs[each.name].append(measured)
                done += 1
                progress("bench", done, total)
        rows += [_row(each, workload, runs[each.name]) for each in contestants]
    return rows


def _row(contestant: Contestant, workload: Workload, runs: list[Measured]) -> dict[str, Any]:
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    row: dict[str, Any] = {
        "row": contestant.name,
        "concurrency": workload.concurrency,
        "tokens_per_second": workload.total / middle.seconds,
        "slowest": workload.total / max(run.seconds for run in runs),
        "fastest": workload.total / min(run.seconds for run in runs),
        "median_latency": statistics.median(middle.latencies),
        "longest_latency": max(middle.latencies),
        "is_simulation": contestant.is_simulation,
        **middle.facts,
    }
    if middle.first_tokens:
        row["median_first_token"] = statistics.median(middle.first_tokens)
    return row


# --- Beside what is possible ---------------------------------------------------------------------------------------

PHASES = ("enter_seconds", "block_seconds", "test_seconds", "exit_seconds", "seconds")


def prompt_costs(run: Callable[[Workload], Measured], workload: Workload, rounds: int) -> dict[str, float]:
    """Seconds per phase that the prompts of ``workload`` take alone, with a first token each."""
    facts = [run(workload.with_answers_of(1)).facts for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in facts) for name in PHASES}


def efficiency(
    full: dict[str, Any], row: dict[str, Any], prompts: dict[str, float], requests: int, num_recursions: int
) -> dict[str, float]:
    """``G``, ``G*`` and ``η`` of new tokens after the first: an engine's row beside its row at full depth.

    Args:
        full: At full depth; what entering, leaving and a recursion cost is taken from here.
        row: With tokens that leave early; what skipping costs is taken from here.
        prompts: What prompts with their first tokens cost in both.
        requests: In a run.
        num_recursions: Of the model.
    """
    tokens = max(1, full["new_tokens"] - requests)
    spent = {name: full[name] - prompts[name] for name in PHASES}
    between = spent["test_seconds"] / tokens
    rest = spent["seconds"] - sum(spent[name] for name in PHASES[:-1])
    costs = Costs(
        enter=(spent["enter_seconds"] + rest) / tokens,
        block=spent["block_seconds"] / (tokens * num_recursions),
        leave=spent["exit_seconds"] / tokens + between,
        skip=max(0.0, (row["test_seconds"] - prompts["test_seconds"]) / tokens - between),
    )
    recursions = (row["recursions"] - requests * num_recursions) / tokens
    gain = spent["seconds"] / (row["seconds"] - prompts["seconds"])
    ideal = ideal_gain(costs, num_recursions, recursions)
    return {
        "gain": gain,
        "ideal_gain": ideal,
        "ideal_gain_per_call": ideal_gain_per_call(costs, num_recursions, recursions),
        "efficiency": gain / ideal,
        "recursions_of_new_tokens": recursions,
        "enter_milliseconds": 1e3 * costs.enter,
        "block_milliseconds": 1e3 * costs.block,
        "leave_milliseconds": 1e3 * costs.leave,
        "skip_milliseconds": 1e3 * costs.skip,
    }
