"""Benchmark of the device loop: launches per iteration, and on a GPU the throughput relative to the memory bound.

::

    python benchmarks/device_loop.py --shape 135M                                        # launches, and times on a CPU
    python benchmarks/device_loop.py --shape 1.7B --device cuda --dtype bfloat16 --slots 1 64

Random weights of a model without prelude and coda: an iteration is one block call, the logits and the state machine.
The engine generates completions of one length with the host loop, with the device loop, and with the device loop and
forced exits: a table makes fractions .5, .3 and .2 (or .5 and .5) of the tokens exit after each recursion. They are
compared with the memory bound (the bytes that a step must read, divided by the bandwidth of a copy in the same run)
and with transformers' compiled loop over a static cache.

*Launches* are PyTorch calls that compute something and Triton kernels; those of the device loop are recorded on the
meta device. Replaying a graph is one launch.
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
    "engine, host loop",
    "engine, device loop",
    "engine, device loop, forced exits",
    "transformers, compiled loop",
)
PARTS = {2: (0.5, 0.5), 3: (0.5, 0.3, 0.2)}


class Counted(TorchDispatchMode):
    """Counter of calls that compute something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        if not is_view and not func.name().startswith(("aten::empty", "aten::_unsafe_view", "aten::new_empty")):
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def launches(shape: str, slots: int, *, exits_early: bool) -> dict[str, int]:
    """Number of launches of one iteration with ``slots`` new tokens at mixed depths, by loop and implementation."""
    model = random_model(shape, torch.float32, "cpu")
    recursions = model.config.num_recursions
    engine = Engine(model, max_num_seqs=slots, num_pages=slots * 4, max_model_len=64, kv="latest", force_kv=True)
    for number in range(slots):
        forced = (number % recursions, 0, 1) if exits_early else None
        engine.add([5 + number, 6], SamplingParams(max_tokens=40, ignore_eos=True, forced_depths=forced))
        engine.step()
    with Counted() as host:
        for _ in range(recursions):
            engine.step()
    once = -(-5 * slots // (4 * recursions)) if exits_early else slots
    shape_of_loop = LoopShape(slots, once, slots, once, exits_early=exits_early)
    decoder = adapt_decoder(model)
    with torch.inference_mode(), decoder.in_use(), Counted() as references:
        runner = ModelRunner(decoder, KVCache(decoder, "latest", 16, slots * 4, 64))
        loop = DeviceLoop(runner, "latest", slots, 1, "reference")
        before = references.calls.total()
        for part in (loop.enter, loop.block, loop.exit):
            part(shape_of_loop)
        in_pytorch = references.calls.total() - before
    decoder = adapt_decoder(model.to("meta"))
    with torch.inference_mode(), decoder.in_use(), recorded() as kernels, Counted() as device:
        runner = ModelRunner(decoder, KVCache(decoder, "latest", 16, slots * 4, 64), kernels=True)
        loop = DeviceLoop(runner, "latest", slots, 1, "triton")
        before, kernels_before = device.calls.total(), len(kernels)
        for part in (loop.enter, loop.block, loop.exit):
            part(shape_of_loop)
    return {
        "host": round(host.calls.total() / recursions),
        "loop_in_pytorch": in_pytorch,
        "loop_pytorch": device.calls.total() - before,
        "loop_triton": len(kernels) - kernels_before,
    }


def step_bytes(model: Any, slots: int, tokens: float) -> float:
    """Bytes that a full-depth step of ``slots`` sequences of ``tokens`` reads: weights per use, keys and values."""
    config, size = model.config, model.dtype.itemsize
    block = sum(parameter.numel() for parameter in model.model.block.parameters())
    head = model.get_output_embeddings().weight.numel()
    layers = config.num_recursions * len(model.model.block)
    kv = 2 * layers * config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return size * (config.num_recursions * block + head + slots * tokens * kv)


def contestants(model: Any, compiled: bool, replays: int) -> list[Contestant]:
    """Engine configurations and baselines."""
    recursions = model.config.num_recursions
    exits = ForcedExits.draw(PARTS[recursions], 64)
    loop: dict[str, Any] = {"device_loop": True, "num_device_steps": replays, "sync_phases": False}
    forced = EngineRunner(model, exits.params, kv="latest", force_kv=True, **loop)
    # Graphs are captured and kernels compiled for the shapes that a run uses.
    found = [
        Contestant(HOST, EngineRunner(model, device_loop=False, sync_phases=False)),
        Contestant(LOOP, EngineRunner(model, **loop), compiles=True),
        Contestant(FORCED, forced, compiles=True),
    ]
    if compiled:
        compiling = CompileConfig(fullgraph=False, mode="reduce-overhead")
        compiling._compile_all_devices = True
        run = generate_runner(model, cache_implementation="static", compile_config=compiling)
        found.append(Contestant(COMPILED, run, compiles=True))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark."""
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
    """Markdown report."""
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
    head = ["", "concurrency", "tokens/s", "× host loop", "× compiled", "of the bound", "G", "η"]
    device = facts["device"] if setup["device"] == "cuda" else f"CPU, {facts['threads']} thread(s)"
    notes = (
        f"Random weights of the {setup['shape']} shapes in {facts['recursions']} recursions, {device}, "
        f"{setup['dtype']}; median of {setup['rounds']} interleaved rounds, {setup['new']} new tokens after a prompt "
        f"of {setup['prompt']}. *G*: speed-up of forced exits over the device loop at full depth; *η* = G / (R / D), "
        f"with D recursions per token; *of the bound*: fraction of the speed at which the bytes of a step can be read."
    )
    made = "Made by `python benchmarks/device_loop.py`; all figures, settings and versions in the JSON beside it."
    text = f"# {facts['title']}\n\n{made}\n\n{notes}\n\n{markdown_table(head, lines)}\n"
    return text + (count_table(facts["launches"]) if "launches" in facts else "")


def count_table(counted: dict[str, dict[str, int]]) -> str:
    """Markdown table of launches."""
    head = ["launches per iteration", "host loop", "device loop", "with kernels", "of which Triton", "as graphs"]
    lines = [
        [
            name,
            *(str(counts[column]) for column in ("host", "loop_in_pytorch")),
            str(counts["loop_pytorch"] + counts["loop_triton"]),
            str(counts["loop_triton"]),
            "3",
        ]
        for name, counts in counted.items()
    ]
    notes = (
        "An iteration has 64 new tokens at mixed depths, in the 135M shapes, with kv `latest`. The first two columns "
        "use PyTorch's implementations, the third Triton kernels; the three graphs are enter, block and exit."
    )
    return f"\n{notes}\n\n{markdown_table(head, lines)}\n"


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
    parser.add_argument("--replays", type=int, default=8, help="iterations between two reads by the host")
    parser.add_argument("--compiled", action="store_true", help="also run transformers' compiled loop")
    parser.add_argument("--output", type=Path, default=None, help="Markdown file; JSON is written beside it")
    options = parser.parse_args()
    facts = measure(options)
    name = "device_loop" if options.device == "cpu" else f"device_loop_{options.shape}".replace(".", "_")
    output = options.output or RESULTS / f"{name}.md"
    title = "The device loop"
    if options.device != "cpu":
        title = f"The device loop on a GPU: {options.shape}" + (", with a compiled loop" if options.compiled else "")
    else:
        facts["launches"] = {
            "all tokens run all depths": launches("135M", 64, exits_early=False),
            "tokens exit early": launches("135M", 64, exits_early=True),
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
