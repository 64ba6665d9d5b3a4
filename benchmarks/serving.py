"""Cost of serving: streams of many clients against the engine alone, and a soak test of everything that clients do.

::

    OMP_NUM_THREADS=1 python benchmarks/serving.py MODEL --dense FOLDER --output serving.json
    python benchmarks/serving.py MODEL --soak --minutes 30 --requests 10000 --output serving_soak.json

``MODEL`` is a recursive model. In the first form, ``--clients`` clients in this process stream responses from a server
in another, and a third process runs the engine alone on the same prompts with the same concurrency. With ``--dense``, a
folder of the dense model, the clients also stream from it: from our server, where it is a model of one recursion, and
from ``transformers serve`` with continuous batching. All take turns, with other prompts in each round, so that no
prefix is cached. In the second form, clients also disconnect, time out, read slowly and send invalid requests;
afterwards memory, pages in use and requests without a response are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from keyed_results import markdown_table
from quality import commit
from recursify.checkpoint.loading import load_model
from recursify.cli.report import talk
from recursify.engine import Engine, SamplingParams
from recursify.evaluation.text import default_text
from serving_clients import ServerProcess, load, served, served_by_transformers
from serving_soak import Soak

WARM_TOKENS = 4
"""New tokens of the round that warms up."""

PAGE = 32
"""Tokens of a page of `transformers serve`, which else takes most of the machine's memory for its pages."""

ALONE, SERVED = "engine alone", "served"


def parse() -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dense", default=None, help="folder of the dense model, for the controls")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--answers", type=int, default=1, help="per client and round, one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--exit", default=None, help="policy; the model's thresholds")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--describe", default=None, help="what the model is, for the report")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="JSON to write, and Markdown beside it")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts_of(options: argparse.Namespace, tokenizer: Any) -> list[list[str]]:
    """Draw different pieces of held-out text for each round, including the warm-up: one per response."""
    ids = tokenizer("\n".join(default_text("held_out").documents)[:600_000], add_special_tokens=False)["input_ids"]
    per_round, length = options.clients * options.answers, options.prompt_tokens
    count = per_round * (options.rounds + 1)
    stride = max(1, (len(ids) - length) // count)
    texts = [tokenizer.decode(ids[number * stride : number * stride + length]) for number in range(count)]
    return [texts[start : start + per_round] for start in range(0, count, per_round)]


@dataclass
class Measured:
    """Measurements of one contestant in one round.

    Attributes:
        tokens_per_second: New tokens per second of all clients together.
        first: Seconds to the first token of each response.
        engine_seconds: Fraction of the time in which the engine computed.
    """

    tokens_per_second: float
    first: list[float] = field(default_factory=list)
    engine_seconds: float | None = None


Contestant = Callable[[list[str], int], Measured]
"""Callable that generates a number of new tokens for each prompt."""


def run_alone(options: argparse.Namespace) -> None:
    """Run the engine alone: read prompts and a number of tokens per line of stdin, print tokens per second."""
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    engine = Engine(model, tokenizer, max_num_seqs=options.clients)
    for line in sys.stdin:
        prompts, new_tokens = json.loads(line)
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, exit=options.exit)
        started = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds = time.perf_counter() - started
        print(sum(len(output.token_ids) for output in outputs) / seconds, flush=True)


@contextlib.contextmanager
def alone() -> Iterator[Contestant]:
    """Start the engine in a process of its own, which gets all prompts at once."""
    command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def generate(prompts: list[str], new_tokens: int) -> Measured:
        process.stdin.write(json.dumps([prompts, new_tokens]) + "\n")
        process.stdin.flush()
        return Measured(float(process.stdout.readline()))

    yield generate
    process.stdin.close()
    process.wait(60)


def clients_of(options: argparse.Namespace, server: ServerProcess, **body: Any) -> Contestant:
    """Make clients of ``server``, whose requests contain ``body`` besides prompt and length."""

    def seconds() -> float | None:
        return server.metrics()["recursify_engine_seconds_total"] if server.engine_pid is not None else None

    def generate(prompts: list[str], new_tokens: int) -> Measured:
        bodies = [{"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, **body} for prompt in prompts]
        before = seconds()
        found = asyncio.run(load(server.url, options.clients, bodies))
        after = seconds()
        wrong = [each.tokens for each in found.answers if each.tokens != new_tokens]
        assert not wrong, f"responses of {wrong} tokens instead of {new_tokens}"
        first = [each.first for each in found.answers]
        part = None if before is None or after is None else (after - before) / found.seconds
        return Measured(found.tokens_per_second, first, part)

    return generate


def engine_arguments(options: argparse.Namespace) -> list[str]:
    """Options of `recursify serve`."""
    return ["--max-num-seqs", str(options.clients), "--dtype", options.dtype, "--device", options.device]


def compare(options: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, list[Measured]]:
    """Measure all contestants in turns, after a warm-up round."""
    arguments = engine_arguments(options)
    ours: dict[str, Any] = {"ignore_eos": True}
    exits = {} if options.exit is None else {"exit": {"policy": options.exit}}
    server = stack.enter_context(served(options.model, *arguments))
    contestants: dict[str, Contestant] = {
        ALONE: stack.enter_context(alone()),
        SERVED: clients_of(options, server, **ours, **exits),
    }
    if options.dense is not None:
        dense = stack.enter_context(served(options.dense, *arguments))
        pages = options.clients * (-(-(options.prompt_tokens + options.new_tokens) // PAGE) + 1)
        paging = ["--cb-block-size", str(PAGE), "--cb-num-blocks", str(pages), "--cb-max-batch-tokens", "2048"]
        placing = ["--dtype", options.dtype, "--device", options.device]
        transformers_server = stack.enter_context(served_by_transformers(options.dense, *paging, *placing))
        contestants |= {
            "dense, served": clients_of(options, dense, **ours),
            "dense, `transformers serve`": clients_of(options, transformers_server),
        }
    found: dict[str, list[Measured]] = {name: [] for name in contestants}
    for number, prompts in enumerate(prompts_of(options, AutoTokenizer.from_pretrained(options.model))):
        for name, contestant in contestants.items():
            measured = contestant(prompts, options.new_tokens if number else WARM_TOKENS)
            talk.print(f"round {number}, {name}: {measured.tokens_per_second:.1f} tokens/s")
            if number:
                found[name].append(measured)
    return found


def figures_of(found: dict[str, list[Measured]]) -> dict[str, Any]:
    """Summarize the rounds."""
    rows: dict[str, Any] = {}
    for name, rounds in found.items():
        speeds = [each.tokens_per_second for each in rounds]
        ratios = [speed / alone.tokens_per_second for speed, alone in zip(speeds, found[ALONE], strict=True)]
        row: dict[str, Any] = {
            "tokens_per_second": round(statistics.median(speeds), 2),
            "tokens_per_second_rounds": [round(speed, 2) for speed in speeds],
            "over_engine": round(statistics.median(ratios), 4),
            "over_engine_rounds": [round(ratio, 4) for ratio in ratios],
        }
        first = sorted(second for each in rounds for second in each.first)
        if first:
            row["first_token_seconds"] = {
                name: round(first[int(part * (len(first) - 1))], 3)
                for name, part in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("largest", 1.0))
            }
        busy = [each.engine_seconds for each in rounds if each.engine_seconds is not None]
        if busy:
            row["engine_at_work"] = round(statistics.median(busy), 4)
        rows[name] = row
    return rows


def report(facts: dict[str, Any], name: str) -> str:
    """The figures as Markdown."""
    setup = facts["setup"]
    lines = []
    for label, row in facts["contestants"].items():
        first = row.get("first_token_seconds", {})
        lines.append(
            [
                label,
                f"{row['tokens_per_second']:.1f}",
                ", ".join(f"{speed:.1f}" for speed in row["tokens_per_second_rounds"]),
                f"{row['over_engine']:.2f}",
                f"{first['median']:.2f}" if first else "",
                f"{first['p99']:.2f}" if first else "",
                f"{row['engine_at_work']:.1%}" if "engine_at_work" in row else "",
            ]
        )
    head = ["", "tokens/s", "rounds", "× engine alone", "first s, median", "first s, p99", "engine at work"]
    return f"""# Serving beside the engine alone

Made by `python benchmarks/serving.py`; all figures, settings and versions in `{name}`.

{setup["model"]}; {setup["dtype"]}, {setup["device"]}, {facts["threads"]} thread(s) of PyTorch in each process, on \
{facts["machine"]}, of which the clients take a part, too. {setup["clients"]} clients at once in a process of their \
own, {setup["answers"]} answer(s) each and round, prompts of {setup["prompt_tokens"]} tokens, \
{setup["new_tokens"]} new ones, streamed; median of {setup["rounds"]} rounds in turns, each with prompts of its own. \
*first s*: from a request to its first token, where all come at once. *engine at work*: the fraction of the time in \
which the engine computed.

{markdown_table(head, lines)}
"""


def main() -> None:
    options = parse()
    if options.alone:
        run_alone(options)
        return
    with contextlib.ExitStack() as stack:
        if options.soak:
            server = stack.enter_context(served(options.model, *engine_arguments(options)))
            tokenizer = AutoTokenizer.from_pretrained(options.model)
            prompts = [prompt for each in prompts_of(options, tokenizer) for prompt in each]
            soak = Soak(server, prompts, seed=options.seed, clients=options.clients, new_tokens=options.new_tokens)
            figures = asyncio.run(soak.run(options.minutes, options.requests))
        else:
            figures = {"contestants": figures_of(compare(options, stack))}
    left_out = ("output", "alone", "describe", *(("answers", "rounds", "exit", "dense") if options.soak else ()))
    left_out += () if options.soak else ("soak", "minutes", "requests", "seed")
    setup = {name: value for name, value in vars(options).items() if name not in left_out}
    setup["model"] = options.describe or Path(options.model).name
    if options.dense is not None:
        setup["dense"] = Path(options.dense).name
    facts = {
        **figures,
        "setup": setup,
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    text = json.dumps(facts, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
        if not options.soak:
            options.output.with_suffix(".md").write_text(report(facts, options.output.name), encoding="utf-8")


if __name__ == "__main__":
    main()
