"""Measure what routing saves and what it costs in quality.

::

    python benchmarks/routing.py block
    python benchmarks/routing.py quality --routed DIR --random DIR --exits DIR

``block`` runs the shared block of a random model of SmolLM2-135M's shapes on 1024 tokens at capacities 1, 2/3 and 1/3,
forward and forward with backward, and sets floating-point operations and time beside the ideal. The capacities take
turns, round by round, and the median over the rounds is kept.

``quality`` compares, on the same held-out text: a routed model; one whose router was chance in training too; a model
with exits under a confidence, of which as many recursions are run per token; and that model at fixed depths. All should
have been uptrained on the same tokens, from the same model. Routed figures are those of inference: each token is judged
by itself. Tokens per second are of greedy decoding, one prompt at a time.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from keyed_results import KeyedResults, markdown_table, short
from quality import MODEL, commit
from recursify.checkpoint.loading import load_model
from recursify.cli.report import talk
from recursify.evaluation.exit_thresholds import exit_contexts
from recursify.evaluation.router_calibration import calibrate_thresholds
from recursify.evaluation.text import default_text, token_windows
from recursify.modeling import (
    ExitPolicy,
    ExitSettings,
    LayerLayout,
    RecursiveConfig,
    RecursiveForCausalLM,
    make_policy,
)

CAPACITIES = {"1": 1.0, "2/3": 2 / 3, "1/3": 1 / 3}
RESULTS = Path(__file__).parent / "results"
LENGTH = 1024
BLOCK_COLUMNS = ("pass", "capacity", "tflop", "flop_part", "milliseconds", "time_part", "rounds", "commit", "date")
QUALITY_COLUMNS = ("row", "recursions", "perplexity", "agreement", "tokens_per_second", "commit", "date")


def versions() -> dict[str, str]:
    named = {name: version(name) for name in ("torch", "transformers", "recursify")}
    return {"python": platform.python_version(), **named, "threads": str(torch.get_num_threads())}


def stamp() -> dict[str, str]:
    return {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}


# --- What the block costs ------------------------------------------------------------------------------------------


def block_model(attention: str, layers: int) -> RecursiveForCausalLM:
    """Nothing but a block, run twice at the same capacity; random, of SmolLM2-135M's shapes, rank 64."""
    torch.manual_seed(0)
    dense = LlamaConfig(
        vocab_size=256,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 * layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2 * LENGTH,
    )
    config = RecursiveConfig.from_dense(dense, LayerLayout.fold(2 * layers, 2, "cycle"), lora_rank=64)
    config._attn_implementation = attention
    model = RecursiveForCausalLM(config).train()
    model.add_routers("expert_choice")
    with torch.no_grad():
        for router in model.model.routers:
            router.weight.normal_()
    return model


def run_block(model: RecursiveForCausalLM, capacity: float, ids: Tensor, *, backward: bool) -> None:
    """Both recursions at ``capacity``."""
    model.model.training_capacities = [capacity, capacity]
    with torch.set_grad_enabled(backward):
        states = model.model(ids, use_cache=False).last_hidden_state
        if backward:
            states.sum().backward()
            model.zero_grad()


def count_operations(layers: int, ids: Tensor) -> dict[tuple[str, str], float]:
    """Floating-point operations of both recursions; eager attention, whose products are counted one by one."""
    model, counted = block_model("eager", layers), {}
    for way, backward in (("forward", False), ("with backward", True)):
        for name, capacity in CAPACITIES.items():
            with FlopCounterMode(display=False) as counter:
                run_block(model, capacity, ids, backward=backward)
            counted[way, name] = float(counter.get_total_flops())
    return counted


def measure_block(arguments: argparse.Namespace) -> None:
    """Take ``--rounds`` rounds and write the table."""
    ids = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    operations = count_operations(arguments.layers, ids)
    model = block_model("sdpa", arguments.layers)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in operations}
    for number in range(arguments.rounds + 1):
        for way, name in operations:
            started = time.perf_counter()
            run_block(model, CAPACITIES[name], ids, backward=way != "forward")
            if number:  # the first round warms up
                seconds[way, name].append(time.perf_counter() - started)
        talk.print(f"round {number} of {arguments.rounds}")
    setup = {"length": LENGTH, "layers": arguments.layers, "machine": platform.machine(), "versions": versions()}
    results = KeyedResults(
        arguments.output,
        BLOCK_COLUMNS,
        lambda row: (row["pass"], list(CAPACITIES).index(row["capacity"])),
        setup,
        partial(report_block, setup, arguments.output),
    )
    for way, name in operations:
        median, whole = statistics.median(seconds[way, name]), statistics.median(seconds[way, "1"])
        results.add(
            {
                "pass": way,
                "capacity": name,
                "tflop": f"{operations[way, name] / 1e12:.4g}",
                "flop_part": f"{operations[way, name] / operations[way, '1']:.4f}",
                "milliseconds": f"{1e3 * median:.1f}",
                "time_part": f"{median / whole:.4f}",
                "rounds": arguments.rounds,
                **stamp(),
            }
        )


def report_block(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """The table with what a reader must know of it."""
    lines = [
        [
            f"{row['pass']}, capacity {row['capacity']}",
            row["tflop"],
            f"{float(row['flop_part']):.3f}",
            row["milliseconds"],
            f"{float(row['time_part']):.3f}",
            f"{CAPACITIES[row['capacity']]:.3f}",
        ]
        for row in rows.values()
    ]
    head = ["", "TFLOP", "of capacity 1", "ms", "of capacity 1", "ideal"]
    made = f"Made by `python benchmarks/routing.py block`; figures in `{output.name}`, settings and versions in"
    what = (
        f"Two recursions of a block of {setup['layers']} layers of SmolLM2-135M's shapes (rank 64) over "
        f"{setup['length']} tokens, with routers, gathering and scattering, in float32 on "
        f"{setup['versions']['threads']} CPU thread(s). The ideal is the capacity; attention, which is quadratic, may "
        f"fall below it in operations, while a mask of its own costs it sdpa's causal shortcut."
    )
    table = markdown_table(head, lines)
    return f"# What routing saves\n\n{made} `{output.with_suffix('.json').name}`.\n\n{what}\n\n{table}\n"


# --- What it costs in quality --------------------------------------------------------------------------------------


Read = Callable[[RecursiveForCausalLM, Tensor], tuple[Tensor, Tensor]]
"""Function from a window ``[1, T]`` to logits ``[T - 1, V]`` and recursions ``[T - 1]`` of all tokens but the last."""


class Reading:
    """A model, how it reads a text, and the arguments it generates with."""

    def __init__(self, folder: Path, read: Read, **generates: Any):
        loaded, _ = load_model(str(folder), dtype="float32")
        assert isinstance(loaded, RecursiveForCausalLM)
        self.model, self.read, self.generates = loaded, read, generates


def read_routed(model: RecursiveForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model.model(ids, use_cache=False)
    assert outputs.routing is not None
    return model.compute_logits(outputs.last_hidden_state[0, :-1]), outputs.routing.depths[0, :-1] + 1


def read_at_depth(depth: int | None, model: RecursiveForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids, use_cache=False, **({} if depth is None else {"exit_depth": depth})).logits[0, :-1]
    return logits, torch.full(logits.shape[:1], model.config.num_recursions if depth is None else depth + 1)


def read_with_exits(policy: ExitPolicy, model: RecursiveForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each token by the first exit that is sure enough; deeper keys are exact, as with ``kv`` deferred."""
    boundaries, last = exit_contexts(model, ids, policy.vocabulary)
    logits = model.compute_logits(last)
    recursions = torch.full(logits.shape[:1], model.config.num_recursions)
    thresholds = policy.thresholds(len(boundaries))
    for boundary in reversed(boundaries):
        leaves = policy.confidence(boundary) > thresholds[boundary.depth]
        logits = torch.where(leaves[:, None], boundary.all_logits, logits)
        recursions = torch.where(leaves, boundary.depth + 1, recursions)
    return logits, recursions


def matching_threshold(model: RecursiveForCausalLM, name: str, windows: Tensor, recursions: float) -> float:
    """The threshold at which an exit policy runs as many recursions per token, by bisection."""
    policy = make_policy(name, 0.5)
    low, high = policy.lowest, policy.highest
    for _ in range(12):
        middle = (low + high) / 2
        found = torch.cat([read_with_exits(make_policy(name, middle), model, each)[1] for each in windows.split(1)])
        low, high = (middle, high) if float(found.float().mean()) < recursions else (low, middle)
    return (low + high) / 2


@torch.inference_mode()
def measure_reading(reading: Reading, windows: Tensor, choices: Tensor, prompts: Tensor, new: int) -> dict[str, Any]:
    """Figures on ``windows [N, T]``; ``choices`` are the dense model's first tokens ``[N, T − 1]``."""
    loss, agreed, recursions = 0.0, 0, 0.0
    for window, choice in zip(windows, choices, strict=True):
        logits, depths = reading.read(reading.model, window[None])
        loss += float(F.cross_entropy(logits.float(), window[1:], reduction="sum"))
        agreed += int((logits.argmax(-1) == choice).sum())
        recursions += float(depths.float().mean())
    count = choices.numel()
    seconds = []
    for prompt in prompts:
        started = time.perf_counter()
        reading.model.generate(
            prompt[None], max_new_tokens=new, min_new_tokens=new, do_sample=False, **reading.generates
        )
        seconds.append(time.perf_counter() - started)
    return {
        "recursions": f"{recursions / len(windows):.3f}",
        "perplexity": f"{math.exp(loss / count):.5g}",
        "agreement": f"{agreed / count:.4f}",
        "tokens_per_second": f"{new / statistics.median(seconds):.2f}",
        **stamp(),
    }


def readings(arguments: argparse.Namespace, calibration: Tensor) -> dict[str, Callable[[], Reading]]:
    """The rows, each made when it is measured; thresholds are chosen on text that is not measured on."""
    rows: dict[str, Callable[[], Reading]] = {}
    if arguments.routed:
        rows["router"] = lambda: at_even_odds(Reading(arguments.routed, read_routed))
        rows["router, calibrated"] = lambda: calibrated(Reading(arguments.routed, read_routed), calibration)
    if arguments.random:
        rows["random router"] = lambda: Reading(arguments.random, read_routed)
    if arguments.exits:
        config = RecursiveConfig.from_pretrained(arguments.exits)
        for depth in (*config.exit_depths, None):
            name = f"static, {config.num_recursions if depth is None else depth + 1} recursions"
            more = {} if depth is None else {"exit_depth": depth}
            rows[name] = partial(Reading, arguments.exits, partial(read_at_depth, depth), **more)
        for policy in arguments.policies:
            rows[f"exit by {policy}"] = partial(exiting, arguments, policy, calibration)
    return rows


def at_even_odds(reading: Reading) -> Reading:
    """A score of 0.5 decides, whatever thresholds were chosen when the model was trained."""
    reading.model.config.router_thresholds = None
    return reading


def calibrated(reading: Reading, calibration: Tensor) -> Reading:
    calibrate_thresholds(reading.model, list(calibration.split(1)))
    return reading


def exiting(arguments: argparse.Namespace, name: str, calibration: Tensor) -> Reading:
    """Exits under a policy, at the threshold that runs as many recursions as ``--recursions``."""
    reading = Reading(arguments.exits, partial(read_at_depth, None))
    with torch.inference_mode():
        threshold = matching_threshold(reading.model, name, calibration, arguments.recursions)
    policy = make_policy(name, threshold)
    talk.print(f"exit by {name}: threshold {threshold:.3f}")
    reading.read = partial(read_with_exits, policy)
    reading.generates = {"exit_policy": ExitSettings(policy)}
    return reading


def measure_quality(arguments: argparse.Namespace) -> None:
    """Measure every row and write the table."""
    dense, tokenizer = load_model(arguments.dense, dtype="float32")
    windows = token_windows(tokenizer, default_text("held_out"), arguments.length)[: arguments.windows]
    calibration = token_windows(tokenizer, default_text("calibration"), arguments.length)[
        : arguments.calibration_windows
    ]
    with torch.inference_mode():
        choices = torch.cat([dense(window[None], use_cache=False).logits[:, :-1].argmax(-1) for window in windows])
    prompts = windows[: arguments.prompts, :32]
    setup = {
        **{name: getattr(arguments, name) for name in ("models_are", "dense", "length", "new", "calibration_windows")},
        "windows": len(windows),
        "recursions_of_exits": arguments.recursions,
        "text": default_text("held_out").name,
        "versions": versions(),
    }
    results = KeyedResults(
        arguments.output,
        QUALITY_COLUMNS,
        lambda row: (row["row"],),
        setup,
        partial(report_quality, setup, arguments.output),
    )
    for name, make in readings(arguments, calibration).items():
        figures = measure_reading(make(), windows, choices, prompts, arguments.new)
        talk.print(f"{name}: {figures}")
        results.add({"row": name, **figures})


def report_quality(setup: dict[str, Any], output: Path, rows: dict[Any, dict[str, Any]]) -> str:
    """The table with what a reader must know of it."""
    lines = [
        [
            row["row"],
            f"{float(row['recursions']):.2f}",
            short(row["perplexity"]),
            f"{float(row['agreement']):.1%}",
            row["tokens_per_second"],
        ]
        for row in rows.values()
    ]
    head = ["", "recursions per token", "perplexity", "first choice as dense", "tokens/s"]
    made = f"Made by `python benchmarks/routing.py quality`; figures in `{output.name}`, settings and versions in"
    what = (
        f"{setup['models_are']}. {setup['windows']} windows of {setup['length']} tokens of {setup['text']}. *Router* "
        f"decides at a score of 0.5; *calibrated*, and exits, which are to run {setup['recursions_of_exits']:g} "
        f"recursions per token, at thresholds chosen on {setup['calibration_windows']} windows of other text. "
        f"Tokens per second: greedy, one prompt at a time, {setup['new']} tokens."
    )
    table = markdown_table(head, lines)
    title = "# Routers beside exits and fixed depths"
    return f"{title}\n\n{made} `{output.with_suffix('.json').name}`.\n\n{what}\n\n{table}\n"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    block = commands.add_parser("block")
    block.add_argument("--layers", type=int, default=4)
    block.add_argument("--rounds", type=int, default=9)
    block.add_argument("--output", type=Path, default=RESULTS / "routing.csv")
    block.set_defaults(run=measure_block)
    quality = commands.add_parser("quality")
    for name in ("routed", "random", "exits"):
        quality.add_argument(f"--{name}", type=Path)
    quality.add_argument("--dense", default=MODEL)
    quality.add_argument("--policies", nargs="+", default=["confidence", "head"])
    quality.add_argument("--recursions", type=float, default=1.5, help="per token, of exits")
    quality.add_argument("--windows", type=int, default=24)
    quality.add_argument("--models-are", default="Models as given", help="what they are, for the table")
    quality.add_argument("--length", type=int, default=256)
    quality.add_argument("--calibration-windows", type=int, default=16, help="of other text, for thresholds")
    quality.add_argument("--prompts", type=int, default=5)
    quality.add_argument("--new", type=int, default=64)
    quality.add_argument("--output", type=Path, default=RESULTS / "routing_quality.csv")
    quality.set_defaults(run=measure_quality)
    arguments = parser.parse_args()
    arguments.run(arguments)
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
