"""Which contestants a bench has, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from recursify.errors import EngineError, SettingsError
from recursify.evaluation.pictures import DARK, SHARED, new_figure, save_figure
from recursify.evaluation.text import default_text
from recursify.modeling import make_policy

from .contestants import (
    Contestant,
    Workload,
    by_engine,
    choose_clock,
    continuous_batches,
    efficiency,
    forced_table,
    prompt_costs,
    run_bench,
    static_batches,
)

FULL = "engine, full depth"
FORCED = "engine, forced exits"
SYNCHRONOUS = "engine, forced exits, rows wait"
GENERATE = "generate"


@dataclass(kw_only=True)
class _Options:
    dense: Any
    concurrency: tuple[int, ...]
    requests: int
    prompt: int
    new: int
    even: bool
    forced: tuple[float, ...] | None
    kv: str
    exit_policy: str | None
    threshold: float | None
    oracle: bool
    compiled: bool
    rounds: int


class BenchPlan:
    """A bench of one model.

    Args:
        model: Recursive or dense.
        tokenizer: Makes prompts of the held-out text; None takes drawn ids, which say nothing of real exits.
        options: As the command has them (``recursify bench --help``).

    Raises:
        EngineError: A forced table that is not one, or a policy that the model cannot follow.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, _Options(**options)
        config = model.config
        self.is_recursive = config.model_type == "recursive"
        self.is_routed = self.is_recursive and config.router is not None
        self.can_leave = self.is_recursive and not self.is_routed and bool(config.exit_depths)
        self.num_recursions = config.num_recursions if self.is_recursive else 1
        forced = self.options.forced
        if forced is not None and (not self.can_leave or len(forced) != self.num_recursions):
            raise EngineError(
                f"--forced has {len(forced)} parts, and the model {self.num_recursions} recursions that tokens can "
                f"leave after. Give one part for each, or leave it out."
            )
        if (self.options.exit_policy or self.options.oracle) and not self.can_leave:
            raise EngineError("The model has no exits. Leave --exit and --oracle out.")
        self.parts = forced or (1 / self.num_recursions,) * self.num_recursions
        self.sources = self._sources()

    def run(self, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Measure; a dict that JSON can hold, with the ``rows``."""
        workloads = [self._workload(each) for each in self.options.concurrency]
        contestants = self._contestants(workloads)
        rows = run_bench(contestants, workloads, rounds=self.options.rounds, progress=progress)
        self._compare(rows, workloads, {each.name: each for each in contestants})
        device = self.model.device
        return {
            "rows": rows,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "clock": "CPU time" if choose_clock(device).__name__ == "process_time" else "wall time",
            "rounds": self.options.rounds,
            "requests": [len(each.prompts) for each in workloads],
            "new_tokens": [each.total for each in workloads],
            "even": self.options.even,
            "forced": list(self.parts),
            "kv": self.options.kv,
            "versions": {name: version(name) for name in ("torch", "transformers", "recursify")},
        }

    def _sources(self) -> list[list[int]]:
        """What prompts are the beginnings of."""
        length = self.options.prompt
        if self.tokenizer is not None:
            found = []
            for document in default_text("held_out").documents:
                ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"][:length]
                if len(ids) == length:
                    found.append(ids)
            if found:
                return found
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.model.config.vocab_size, (64, length), generator=generator).tolist()

    def _workload(self, concurrency: int) -> Workload:
        options = self.options
        count = concurrency * options.requests
        return Workload.draw(self.sources, concurrency, count, options.new, even=options.even, seed=concurrency)

    def _contestants(self, workloads: Sequence[Workload]) -> list[Contestant]:
        model, options = self.model, self.options
        found = [Contestant(GENERATE, static_batches(model)), Contestant("generate_batch", continuous_batches(model))]
        if self.is_routed:
            found.pop()  # it has pages of its own kind
        if options.compiled:
            compiling = CompileConfig(fullgraph=False)
            compiling._compile_all_devices = True
            arguments = {"cache_implementation": "static", "compile_config": compiling}
            run = static_batches(model, **arguments)
            found.append(Contestant("generate, static cache, compiled", run, compiles=True))
        found.append(Contestant("engine, routers" if self.is_routed else FULL, by_engine(model)))
        if self.can_leave:
            # Skipped keys and values are none of the model's own: the engine is measured, not what it says.
            table = forced_table(self.parts, 997, seed=0)
            forced: dict[str, Any] = {
                "params": lambda number: {"forced_depths": _turned(table, number)},
                "kv": options.kv,
            }
            found.append(Contestant(FORCED, by_engine(model, **forced, force_kv=True)))
            found.append(Contestant(SYNCHRONOUS, by_engine(model, **forced, force_kv=True, lockstep=True)))
        if options.exit_policy is not None:
            found += self._exiting(options.exit_policy)
        if options.oracle:
            found.append(self._oracle(workloads))
        if options.dense is not None:
            found.append(Contestant("dense, generate", static_batches(options.dense)))
            found.append(Contestant("dense, engine", by_engine(options.dense)))
        return found

    def _exiting(self, name: str) -> list[Contestant]:
        """Trained exits, in static batches and in the engine."""
        try:
            policy = make_policy(name, self.options.threshold, self.model.config)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        return [
            Contestant(f"generate, exits by {name}", static_batches(self.model, exit_policy=policy)),
            Contestant(f"engine, exits by {name}", by_engine(self.model, lambda number: {"exit": policy})),
        ]

    def _oracle(self, workloads: Sequence[Workload]) -> Contestant:
        """Leaves at the first exit that says what the last recursion says, known from a run before."""
        tables: dict[tuple[int, int], tuple[int, ...]] = {}
        for workload in workloads:
            for number, (prompt, new) in enumerate(zip(workload.prompts, workload.new_tokens, strict=True)):
                output = self.model.generate(
                    torch.tensor([prompt], device=self.model.device),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    exit_policy="oracle",
                    return_dict_in_generate=True,
                )
                depths = output.exit_depths[0, 1:].tolist()
                tables[workload.concurrency, number] = tuple(depths) or (self.num_recursions - 1,)
        engines = {each.concurrency: by_engine(self.model, partial(_of_oracle, tables, each)) for each in workloads}
        return Contestant(
            "engine, exits by an oracle", lambda workload: engines[workload.concurrency](workload), is_simulation=True
        )

    def _compare(
        self, rows: list[dict[str, Any]], workloads: Sequence[Workload], contestants: dict[str, Contestant]
    ) -> None:
        """Add to each row how it stands beside ``generate``, and beside what is possible."""
        by_key = {(row["row"], row["concurrency"]): row for row in rows}
        for workload in workloads:
            mine = [row for row in rows if row["concurrency"] == workload.concurrency]
            for row in mine:
                row["ratio"] = row["tokens_per_second"] / by_key[GENERATE, workload.concurrency]["tokens_per_second"]
            full = by_key.get((FULL, workload.concurrency))
            if full is None or not self.can_leave:
                continue
            prompts = prompt_costs(contestants[FULL].run, workload, self.options.rounds)
            for row in mine:
                if row["row"].startswith("engine") and row is not full:
                    row |= efficiency(full, row, prompts, len(workload.prompts), self.num_recursions)


def _turned(table: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Another part of the table for every request."""
    start = 31 * number % len(table)
    return table[start:] + table[:start]


def _of_oracle(tables: dict[tuple[int, int], tuple[int, ...]], workload: Workload, number: int) -> dict[str, Any]:
    return {"forced_depths": tables[workload.concurrency, number]}


FIGURES = ("tokens/s", "× generate", "recursions", "occupancy", "KV MiB")
IDEALS = ("gain", "ideal_gain", "ideal_gain_per_call", "efficiency")


def name_of(row: dict[str, Any]) -> str:
    """The row's name; a simulation is called one."""
    return row["row"] + (" (simulation)" if row["is_simulation"] else "")


def figures_of(row: dict[str, Any]) -> list[str]:
    """The :data:`FIGURES` of a row for a table; those of an engine's inside are empty for others."""
    inside = [""] * 3
    if "mean_recursions" in row:
        inside = [f"{row['mean_recursions']:.2f}", f"{row['occupancy']:.0%}", f"{row['kv_bytes'] / 2**20:.1f}"]
    return [f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}", *inside]


def ideals_of(row: dict[str, Any]) -> list[str]:
    """The :data:`IDEALS` of a row, empty where tokens cannot leave early."""
    return [f"{row[name]:.2f}" if name in row else "" for name in IDEALS]


def draw_speeds(facts: dict[str, Any], file: Path) -> None:
    """Tokens per second of every row, by requests at once.

    Raises:
        SettingsError: matplotlib is not installed, or the name of ``file`` is not one of a picture.
        OutputError: The file cannot be written.
    """
    rows = facts["rows"]
    names = list(dict.fromkeys(row["row"] for row in rows))
    sizes = list(dict.fromkeys(row["concurrency"] for row in rows))
    figure = new_figure(8, 1 + 0.35 * len(names) * len(sizes))
    axes = figure.subplots(len(sizes), 1, squeeze=False)[:, 0]
    for axis, size in zip(axes, sizes, strict=True):
        here = {row["row"]: row["tokens_per_second"] for row in rows if row["concurrency"] == size}
        colours = [SHARED if name.startswith("engine") else DARK for name in names]
        axis.barh(names, [here[name] for name in names], color=colours)
        axis.invert_yaxis()
        axis.set_title(f"{size} at once")
        axis.set_xlabel("tokens per second")
    save_figure(figure, file)
