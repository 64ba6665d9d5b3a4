"""What the loop on the device saves: launches per iteration, and on a GPU how near new tokens come to the floor.

::

    python benchmarks/device_loop.py --shape 135M                                        # launches, and a CPU's times
    python benchmarks/device_loop.py --shape 1.7B --device cuda --dtype bfloat16 --slots 1 64

Random weights of a model without prelude and coda, so that an iteration is one call of the block, a readout and the
state machine. The engine writes answers of one length with the host deciding in every iteration, with the loop, and
with the loop where tokens leave after each recursion in parts .5, .3 and .2 (or .5 and .5), as a table says, not the
states. Beside them stand the floor, which is the bytes that a step must read over the bandwidth of a copy in the same
run, and transformers' compiled loop over a static cache.

*Launches* are calls of PyTorch that compute, and of Triton's kernels: of the loop those that are recorded on a device
that computes nothing. A replayed graph is launched once.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from engine import RESULTS, SHAPES, random_model
from gpu_timing import copy_bandwidth, make_flush
from keyed_results import markdown_table
from quality import commit
from recursify.bench.contestants import Contestant, EngineRunner, choose_clock, generate_runner
from recursify.bench.plan import run_contestants
from recursify.bench.workload import ForcedExits, Workload
from recursify.cli.report import progress_report, talk
from recursify.engine import Engine, SamplingParams
from recursify.engine.device_loop.loop import DeviceLoop
from recursify.engine.device_loop.slots import LoopShape
from recursify.engine.layers.decoder import adapt_decoder
from recursify.engine.layers.kv_cache import KVCache
from recursify.engine.layers.model_runner import ModelRunner
from recursify.kernels.ahead_of_time import recorded

HOST, LOOP, FORCED, COMPILED = (
    "engine, host decides",
    "engine, loop on the device",
    "engine, loop, forced exits",
    "transformers, compiled loop",
)
PARTS = {2: (0.5, 0.5), 3: (0.5, 0.3, 0.2)}


class Counted(TorchDispatchMode):
    """Counts calls that compute something: views only look at what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not is_view and not func.name().startswith(("aten::empty", "aten::_unsafe_view", "aten::new_empty")):
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def launches(shape: str, slots: int, *, leaves: bool) -> dict[str, int]:
    """Of one iteration with ``slots`` new tokens at mixed depths, by who decides."""
    model = random_model(shape, torch.float32, "cpu")
    recursions = model.config.num_recursions
    engine = Engine(model, max_num_seqs=slots, num_pages=slots * 4, max_model_len=64, kv="latest", force_kv=True)
    for number in range(slots):
        forced = (number % recursions, 0, 1) if leaves else None
        engine.add([5 + number, 6], SamplingParams(max_tokens=40, ignore_eos=True, forced_depths=forced))
        engine.step()
    with Counted() as host:
        for _ in range(recursions):
            engine.step()
    once = -(-5 * slots // (4 * recursions)) if leaves else slots
    shape_of_loop = LoopShape(slots, once, slots, once, exits_early=leaves)
    parts = adapt_decoder(model)
    with torch.inference_mode(), parts.in_use(), Counted() as forms:
        loop = DeviceLoop(
            ModelRunner(parts, KVCache(parts, "latest", 16, slots * 4, 64)), "latest", slots, 1, "reference"
        )
        before = forms.calls.total()
        for part in (loop.enter, loop.block, loop.exit):
            part(shape_of_loop)
        in_pytorch = forms.calls.total() - before
    parts = adapt_decoder(model.to("meta"))
    with torch.inference_mode(), parts.in_use(), recorded() as kernels, Counted() as own:
        pages = KVCache(parts, "latest", 16, slots * 4, 64)
        loop = DeviceLoop(ModelRunner(parts, pages, kernels=True), "latest", slots, 1, "triton")
        before, kernels_before = own.calls.total(), len(kernels)
        for part in (loop.enter, loop.block, loop.exit):
            part(shape_of_loop)
    return {
        "host": round(host.calls.total() / recursions),
        "loop_in_pytorch": in_pytorch,
        "loop_pytorch": own.calls.total() - before,
        "loop_triton": len(kernels) - kernels_before,
    }


def step_bytes(model: Any, slots: int, tokens: float) -> float:
    """That a step of ``slots`` sequences of ``tokens`` must read at full depth: weights as often as they run, keys."""
    config, size = model.config, model.dtype.itemsize
    block = sum(parameter.numel() for parameter in model.model.block.parameters())
    head = model.get_output_embeddings().weight.numel()
    layers = config.num_recursions * len(model.model.block)
    kv = 2 * layers * config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return size * (config.num_recursions * block + head + slots * tokens * kv)


def contestants(model: Any, compiled: bool, replays: int) -> list[Contestant]:
    """All ways to answer."""
    recursions = model.config.num_recursions
    exits = ForcedExits.draw(PARTS[recursions], 64)
    loop: dict[str, Any] = {"device_loop": True, "num_device_steps": replays, "sync_phases": False}
    leaving = EngineRunner(model, exits.params, kv="latest", force_kv=True, **loop)
    # Graphs are captured, and kernels compiled, for the shapes that a run meets.
    found = [
        Contestant(HOST, EngineRunner(model, device_loop=False, sync_phases=False)),
        Contestant(LOOP, EngineRunner(model, **loop), compiles=True),
        Contestant(FORCED, leaving, compiles=True),
    ]
    if compiled:
        compiling = CompileConfig(fullgraph=False, mode="reduce-overhead")
        compiling._compile_all_devices = True
        run = generate_runner(model, cache_implementation="static", compile_config=compiling)
        found.append(Contestant(COMPILED, run, compiles=True))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    model = random_model(options.shape, getattr(torch, options.dtype), options.device)
    prompt = list(range(7, 7 + options.prompt))
    workloads = [
        Workload([prompt] * slots, [options.new] * slots, slots, options.prompt + 2 * options.new)
        for slots in options.slots
    ]
    with progress_report() as progress:
        found = contestants(model, options.compiled, options.replays)
        rows = run_contestants(found, workloads, rounds=options.rounds, progress=progress)
    rows = [row.to_dict() for row in rows]
    recursions = model.config.num_recursions
    by_key = {(row["row"], row["concurrency"]): row for row in rows}
    bandwidth = copy_bandwidth(make_flush()) if options.device == "cuda" else None
    for row in rows:
        slots = row["concurrency"]
        full = by_key[LOOP, slots]
        row["over_host"] = row["tokens_per_second"] / by_key[HOST, slots]["tokens_per_second"]
        if row["row"] == FORCED:
            most = recursions / ForcedExits.draw(PARTS[recursions], 64).mean_recursions
            row["gain"] = row["tokens_per_second"] / full["tokens_per_second"]
            row["efficiency"] = row["gain"] / most
        elif bandwidth is not None:
            floor = step_bytes(model, slots, options.prompt + options.new / 2) / bandwidth
            row["of_floor"] = row["tokens_per_second"] / slots * floor
        if (COMPILED, slots) in by_key:
            row["over_compiled"] = row["tokens_per_second"] / by_key[COMPILED, slots]["tokens_per_second"]
    is_cuda = options.device == "cuda"
    return {
        "rows": rows,
        "bandwidth": bandwidth,
        "device": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "clock": choose_clock(torch.device(options.device)).__name__,
    }


def report(facts: dict[str, Any]) -> str:
    """The table with what a reader must know of it."""
    setup = facts["setup"]
    columns = ("over_host", "over_compiled", "of_floor", "gain", "efficiency")
    lines = [
        [
            row["row"],
            str(row["concurrency"]),
            f"{row['tokens_per_second']:.1f}",
            *(f"{row[name]:.2f}" if name in row else "" for name in columns),
        ]
        for row in facts["rows"]
    ]
    head = ["", "at once", "tokens/s", "× host decides", "× compiled", "of the floor", "G", "η"]
    device = facts["device"] if setup["device"] == "cuda" else f"CPU, {facts['threads']} thread(s)"
    notes = (
        f"Random weights of the {setup['shape']} shapes in {facts['recursions']} recursions, {device}, "
        f"{setup['dtype']}; median of {setup['rounds']} rounds in turns, {setup['new']} new tokens after a prompt of "
        f"{setup['prompt']}. *G*: forced exits over the loop at full depth; *η* = G / (R / D), with D recursions per "
        f"token; *of the floor*: of the speed at which the bytes of a step can be read."
    )
    made = "Made by `python benchmarks/device_loop.py`; all figures, settings and versions in the JSON beside it."
    text = f"# {facts['title']}\n\n{made}\n\n{notes}\n\n{markdown_table(head, lines)}\n"
    return text + (count_table(facts["launches"]) if "launches" in facts else "")


def count_table(counted: dict[str, dict[str, int]]) -> str:
    """Launches, with what they are of."""
    head = ["launches of an iteration", "host decides", "loop", "loop, kernels", "of which Triton", "graphs of it"]
    lines = [
        [
            name,
            *(str(each[column]) for column in ("host", "loop_in_pytorch")),
            str(each["loop_pytorch"] + each["loop_triton"]),
            str(each["loop_triton"]),
            "3",
        ]
        for name, each in counted.items()
    ]
    what = (
        "An iteration has 64 new tokens at mixed depths here, in the 135M shapes, with keys of kv `latest`. The first "
        "two columns are PyTorch's forms, the third has Triton's kernels; the graphs are enter, block and exit."
    )
    return f"\n{what}\n\n{markdown_table(head, lines)}\n"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replays", type=int, default=8, help="iterations per decision of the host")
    parser.add_argument("--compiled", action="store_true", help="transformers' compiled loop beside it")
    parser.add_argument("--output", type=Path, default=None, help="Markdown; JSON is written beside it")
    options = parser.parse_args()
    facts = measure(options)
    name = "device_loop" if options.device == "cpu" else f"device_loop_{options.shape}".replace(".", "_")
    output = options.output or RESULTS / f"{name}.md"
    title = "The loop on the device"
    if options.device != "cpu":
        title = f"The loop on a GPU: {options.shape}" + (" beside a compiled loop" if options.compiled else "")
    else:
        facts["launches"] = {
            "all tokens run all depths": launches("135M", 64, leaves=False),
            "tokens leave early": launches("135M", 64, leaves=True),
        }
    facts |= {
        "title": title,
        "recursions": SHAPES[options.shape][2] // SHAPES[options.shape][-1],
        "setup": {key: value for key, value in vars(options).items() if key != "output"},
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers", "triton", "recursify")},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    text = report(facts)
    output.write_text(text)
    talk.print(text)


if __name__ == "__main__":
    main()
