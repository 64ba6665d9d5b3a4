"""Benchmark of a model: throughput and latency of the engine beside transformers and the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from recursify.checkpoint.loading import load_model
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import EngineError, SettingsError
from recursify.evaluation.text import default_text, text_start
from recursify.modeling import ExitSettings
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from .contestants import (
    BenchRun,
    Contestant,
    EngineRunner,
    choose_clock,
    generate_batch_runner,
    generate_runner,
    plain_generation,
)
from .ideal import Gain, measure_gain, prompt_costs
from .results import BenchmarkResult, BenchmarkRow, plot_speeds
from .settings import BenchSettings
from .workload import ForcedExits, Workload

GENERATE, FULL = "generate", "engine, full depth"


def benchmark_model(
    model: str | Path,
    *,
    settings: BenchSettings | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> BenchmarkResult:
    """Measure the engine at full depth and with early exit, beside ``generate`` and the dense model.

    Args:
        model: Folder, ``.gguf`` file or Hub id of a recursive or dense model.
        settings: Settings; exclusive with ``options``.
        dtype: Data type of the weights: float32, bfloat16, float16, or auto for the checkpoint's.
        device: Device to run on: cpu, cuda, cuda:1 or mps.
        trust_remote_code: Permission to run Python code from the model's folder.
        progress: Callback for progress.
        options: Fields of :class:`~recursify.bench.settings.BenchSettings`.

    Raises:
        SettingsError: An invalid setting.
        EngineError: Exits that the model does not support.
        RecursifyError: The model does not load, or the plot cannot be written.
    """
    settings = resolve_settings(BenchSettings, settings, options)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        loaded, tokenizer = load_model(model, **loading)
        dense = None if settings.dense is None else load_model(settings.dense, **loading)[0]
        result = BenchPlan(loaded, tokenizer, settings, dense=dense).run(progress)
    finally:
        torch.set_num_threads(threads)
    if settings.plot is not None:
        plot_speeds(result, settings.plot)
    return result


class BenchPlan:
    """Benchmark of a loaded model.

    Args:
        model: Recursive or dense model.
        tokenizer: Tokenizer, for prompts from the held-out text; None uses random token ids, which do not show when
            real text exits.
        settings: Settings.
        dense: Dense model to measure as a control.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: BenchSettings, *, dense: Any = None) -> None:
        self.model, self.tokenizer, self.settings, self.dense, config = model, tokenizer, settings, dense, model.config
        is_recursive = config.model_type == "recursive"
        self.is_routed = is_recursive and config.router is not None
        self.has_exits = is_recursive and not self.is_routed and bool(config.exit_depths)
        self.num_recursions = config.num_recursions if is_recursive else 1
        forced = settings.forced
        if forced is not None and (not self.has_exits or len(forced) != self.num_recursions):
            raise EngineError(
                f"forced has {len(forced)} fractions; the model has {self.num_recursions} recursions after which "
                f"tokens can exit. Give one fraction for each, or none."
            )
        if (settings.exit_policy or settings.oracle) and not self.has_exits:
            raise EngineError("The model has no exits. Remove exit_policy and oracle.")
        self.fractions = forced or (1 / self.num_recursions,) * self.num_recursions
        self.sources = self._sources()

    def run(self, progress: Progress = silent) -> BenchmarkResult:
        """Run all contestants on all workloads."""
        settings, device = self.settings, self.model.device
        workloads = [
            Workload.draw(self.sources, size, size * settings.requests, settings.new, even=settings.even, seed=size)
            for size in settings.concurrency
        ]
        contestants = self._contestants(workloads)
        rows = run_contestants(contestants, workloads, rounds=settings.rounds, progress=progress)
        return BenchmarkResult(
            rows=tuple(self._compare(rows, workloads, contestants)),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            clock="CPU time" if choose_clock(device).__name__ == "process_time" else "wall time",
            rounds=settings.rounds,
            requests=tuple(len(workload.prompts) for workload in workloads),
            new_tokens=tuple(workload.total for workload in workloads),
            even=settings.even,
            forced=self.fractions,
            kv=settings.kv,
            versions={name: version(name) for name in ("torch", "transformers", "recursify")},
        )

    def _sources(self) -> list[list[int]]:
        """Return token sequences whose beginnings are prompts."""
        length = self.settings.prompt
        if self.tokenizer is not None:
            documents = list(default_text("held_out").documents)
            start = text_start(self.tokenizer)
            ids = self.tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
            texts = [[*start, *document] for document in ids]
            if sources := [tokens[:length] for tokens in texts if len(tokens) >= length]:
                vocab_size = self.model.config.vocab_size
                require_known_tokens({token for source in sources for token in source}, vocab_size, self.tokenizer)
                return sources
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.model.config.vocab_size, (64, length), generator=generator).tolist()

    def _contestants(self, workloads: Sequence[Workload]) -> list[Contestant]:
        model, settings = self.model, self.settings
        contestants = [Contestant(GENERATE, generate_runner(model))]
        if not self.is_routed:  # generate_batch does not support a routed model's KV cache
            contestants.append(Contestant("generate_batch", generate_batch_runner(model)))
        if settings.compiled:
            compiling = CompileConfig(fullgraph=False)
            compiling._compile_all_devices = True
            run = generate_runner(model, cache_implementation="static", compile_config=compiling)
            contestants.append(Contestant("generate, static cache, compiled", run, compiles=True))
        contestants.append(Contestant("engine, routers" if self.is_routed else FULL, EngineRunner(model)))
        if self.has_exits:
            contestants += self._forced_exits()
        contestants += self._policy_exits()
        if settings.oracle:
            contestants.append(self._oracle(workloads))
        if self.dense is not None:
            contestants.append(Contestant("dense, generate", generate_runner(self.dense)))
            contestants.append(Contestant("dense, engine", EngineRunner(self.dense)))
        return contestants

    def _forced_exits(self) -> list[Contestant]:
        """Return the engine with forced exits, continuous and in lockstep."""
        # kv is forced, since the model is not trained for forced exits: speed is measured, not output.
        run = partial(EngineRunner, self.model, ForcedExits.draw(self.fractions).params, force_kv=True)
        return [
            Contestant("engine, forced exits", run(kv=self.settings.kv)),
            Contestant("engine, forced exits, rows wait", run(kv=self.settings.kv, lockstep=True)),
        ]

    def _policy_exits(self) -> list[Contestant]:
        """Return ``generate`` and the engine with the exit policy, if there is one."""
        name = self.settings.exit_policy
        try:
            exits = ExitSettings.from_options(name, threshold=self.settings.threshold, config=self.model.config)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if exits is None:
            return []
        return [
            Contestant(f"generate, exits by {name}", generate_runner(self.model, exit_policy=exits)),
            Contestant(f"engine, exits by {name}", EngineRunner(self.model, lambda workload, number: {"exit": exits})),
        ]

    def _oracle(self, workloads: Sequence[Workload]) -> Contestant:
        """Return the engine with exits at the first depth that predicts the final token, from a run of ``generate``."""
        depths: dict[tuple[int, int], tuple[int, ...]] = {}
        options = {"do_sample": False, "exit_policy": "oracle", "return_dict_in_generate": True}
        for workload in workloads:
            for number, (prompt, new) in enumerate(zip(workload.prompts, workload.new_tokens, strict=True)):
                ids = torch.tensor([prompt], device=self.model.device)
                with plain_generation(self.model):
                    output = self.model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
                recorded = tuple(output.exit_depths[0, 1:].tolist())
                depths[workload.concurrency, number] = recorded or (self.num_recursions - 1,)

        def params(workload: Workload, number: int) -> dict[str, Any]:
            return {"forced_depths": depths[workload.concurrency, number]}

        return Contestant("engine, exits by an oracle", EngineRunner(self.model, params), is_simulation=True)

    def _compare(
        self, rows: Sequence[BenchmarkRow], workloads: Sequence[Workload], contestants: Sequence[Contestant]
    ) -> list[BenchmarkRow]:
        """Complete rows with the ratio to ``generate`` and the gain of early exit."""
        runs = {contestant.name: contestant.run for contestant in contestants}
        compared = []
        for workload in workloads:
            by_name = {row.contestant: row for row in rows if row.concurrency == workload.concurrency}
            gains: dict[str, Gain] = {}
            if self.has_exits:
                prompts = prompt_costs(runs[FULL], workload, self.settings.rounds)
                stats = {name: row.stats for name, row in by_name.items() if name.startswith("engine") and row.stats}
                full = stats.pop(FULL)
                for name, early in stats.items():
                    gains[name] = measure_gain(full, early, prompts, len(workload.prompts), self.num_recursions)
            base = by_name[GENERATE].tokens_per_second
            for name, row in by_name.items():
                compared.append(replace(row, ratio=row.tokens_per_second / base, gain=gains.get(name)))
        return compared


def run_contestants(
    contestants: Sequence[Contestant], workloads: Sequence[Workload], *, rounds: int, progress: Progress = silent
) -> list[BenchmarkRow]:
    """Run every contestant on every workload, ``rounds`` times in turns after a short warm-up."""
    rows = []
    total, done = len(workloads) * len(contestants) * (rounds + 1), 0
    for workload in workloads:
        runs: dict[str, list[BenchRun]] = {contestant.name: [] for contestant in contestants}
        for number in range(rounds + 1):
            for contestant in contestants:
                run = contestant.run(workload if number or contestant.compiles else workload.with_new_tokens(2))
                if number:
                    runs[contestant.name].append(run)
                done += 1
                progress("bench", done, total)
        rows += [BenchmarkRow.of(contestant, workload, runs[contestant.name]) for contestant in contestants]
    return rows
