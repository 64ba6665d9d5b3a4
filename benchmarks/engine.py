"""Speed of the engine beside transformers, lock-step batching and the dense model, and the source of its gain.

::

    python benchmarks/engine.py answers DIR --dense MODEL --exit head --threshold 0.9
    python benchmarks/engine.py forced

``answers`` generates with a real model and different lengths, as ``recursify bench`` does. ``forced`` takes random
weights of SmolLM2-135M's shapes, 10 layers three times, of whose tokens .5, .3 and .2 leave after each recursion: how
much of what leaving early could gain at most the engine does gain, which does not depend on what is said.

Contestants take turns, round by round, in one process; with one thread its CPU time is measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from keyed_results import markdown_table
from quality import MODEL, commit
from recursify.bench.plan import BenchPlan
from recursify.bench.results import FIGURES, IDEALS, BenchmarkResult
from recursify.bench.settings import BenchSettings
from recursify.checkpoint.loading import load_model
from recursify.cli.report import progress_report, talk
from recursify.modeling import LayerLayout, RecursiveConfig, RecursiveForCausalLM

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, 10),
    "1.7B": (2048, 8192, 24, 32, 32, 49152, 8),
    "8B": (4096, 14336, 32, 32, 8, 128256, 16),
}
"""Hidden and inner size, layers, heads, key heads, vocabulary, and layers of the block."""


def random_model(shape: str, dtype: torch.dtype, device: str) -> RecursiveForCausalLM:
    """Random weights in a cycle without prelude, coda and residuals."""
    hidden, inner, layers, heads, kv_heads, vocabulary, block = SHAPES[shape]
    dense = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=vocabulary < 100_000,
    )
    config = RecursiveConfig.from_dense(dense, LayerLayout.fold(layers, layers // block, "cycle"), exit_head="shared")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = RecursiveForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def plan_of(arguments: argparse.Namespace) -> BenchPlan:
    """The benchmark that the arguments describe."""
    names = ["requests", "prompt", "new", "rounds", "compiled", "kv"]
    if arguments.what == "forced":
        model = random_model(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
        forced, concurrency = tuple(arguments.forced), tuple(arguments.concurrency)
        shared = {name: getattr(arguments, name) for name in names}
        return BenchPlan(model, None, BenchSettings(forced=forced, concurrency=concurrency, even=True, **shared))
    loading: dict[str, Any] = {"dtype": arguments.dtype, "device": arguments.device}
    model, tokenizer = load_model(arguments.model, **loading)
    settings = BenchSettings(
        concurrency=tuple(arguments.concurrency),
        exit_policy=arguments.exit,
        **{name: getattr(arguments, name) for name in (*names, "even", "threshold", "oracle")},
    )
    return BenchPlan(model, tokenizer, settings, dense=load_model(arguments.dense, **loading)[0])


def report(result: BenchmarkResult, command: str, title: str, what: str, file: Path) -> str:
    """The table with what a reader must know of it."""
    head = ["", "at once", *FIGURES, "block calls", "median s", "first s", *IDEALS]
    lines = []
    for row in result.rows:
        calls, first = "" if row.stats is None else str(row.stats.block_calls), row.median_first_token
        seconds = [f"{row.median_latency:.1f}", "" if first is None else f"{first:.1f}"]
        lines.append([row.label, str(row.concurrency), *row.figures, calls, *seconds, *row.ideals])
    pairs = zip(result.requests, result.new_tokens, strict=True)
    asked = ", ".join(f"{count} requests of {tokens:,} tokens in all" for count, tokens in pairs)
    made = f"Made by `python benchmarks/engine.py {command}`; all figures, settings and versions in `{file.name}`."
    parts = ", ".join(f"{part:.2g}" for part in result.forced)
    notes = (
        f"{what} {result.device}, {result.dtype}, {result.threads} thread(s), {result.clock}; median of "
        f"{result.rounds} rounds in turns; {asked}. *× generate* is beside transformers' `generate` on batches of as "
        f"many as run at once. *rows wait*: lock-step batching; new tokens enter after the deepest row has exited. "
        f"Forced exits after each recursion have shares {parts}, with kv `{result.kv}`. *G* is the gain over the "
        f"engine at full depth, prompts and first tokens left out; *G\\** the theoretical speed-up by the costs of the "
        f"parts, if they follow the number of rows, and *per call*, if they do not (`src/recursify/bench/ideal.py`); "
        f"*η* = G / G\\*."
    )
    return f"# {title}\n\n{made}\n\n{notes}\n\n{markdown_table(head, lines)}\n"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    answers = commands.add_parser("answers")
    answers.add_argument("model")
    answers.add_argument("--model-is", default="A model as given", help="what it is, for the table")
    answers.add_argument("--dense", default=MODEL)
    answers.add_argument("--exit", help="let tokens leave by this policy")
    answers.add_argument("--threshold", type=float)
    answers.add_argument("--oracle", action="store_true")
    answers.add_argument("--even", action="store_true")
    forced = commands.add_parser("forced")
    forced.add_argument("--shape", choices=SHAPES, default="135M")
    forced.add_argument("--forced", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    for command, sizes in ((answers, [1, 8, 32]), (forced, [8, 32, 96])):
        command.add_argument("--concurrency", type=int, nargs="+", default=sizes)
        command.add_argument("--requests", type=int, default=3, help="per place")
        command.add_argument("--prompt", type=int, default=32)
        command.add_argument("--new", type=int, default=32)
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--kv", default="latest")
        command.add_argument("--compiled", action="store_true")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--device", default="cpu")
        command.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / f"engine_{arguments.what}.csv"
    with progress_report() as progress:
        result = plan_of(arguments).run(progress)
    stamp = {"commit": commit(), "date": datetime.now(UTC).date().isoformat(), "python": platform.python_version()}
    facts = result.to_dict() | {"what": arguments.what, "prompt": arguments.prompt, "new": arguments.new, **stamp}
    if arguments.what == "forced":
        title = "The engine beside what is possible"
        what = f"Random weights of SmolLM2's {arguments.shape} shapes, no prelude, coda or residuals."
        if arguments.shape == "8B":
            what = "Random weights of Llama-3.1-8B's shapes, no prelude, coda or residuals."
    else:
        title = "The engine beside transformers and the dense model"
        if arguments.even:
            title = "The engine on answers of one length"
        what = f"{arguments.model_is}."
    facts |= {"title": title, "what_it_is": what}
    output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    names = list(dict.fromkeys(name for row in facts["rows"] for name in row))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(facts["rows"])
    text = report(result, arguments.what, title, what, output.with_suffix(".json"))
    output.with_suffix(".md").write_text(text)
    talk.print(text)


if __name__ == "__main__":
    main()
