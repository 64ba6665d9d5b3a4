"""What serving costs: streams of many clients against the engine alone, and a soak of everything that clients do.

::

    python benchmarks/serving.py MODEL --output serving.json
    python benchmarks/serving.py MODEL --soak --minutes 30 --requests 10000 --output soak.json

``MODEL`` is a recursive model. In the first form, ``--clients`` clients in this process stream answers from a server in
another, each asking again when it has been answered, and a third process runs the engine alone on the same prompts with
as many rows; the two take turns. In the second, clients also leave, give up, read slowly and send what is no request,
and what counts is what is left afterwards: memory, pages, and requests without an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from quality import commit
from recursify.cli.models import load_model
from recursify.cli.report import talk
from recursify.engine import Engine, SamplingParams
from recursify.evaluation.text import default_text
from serving_clients import ServerProcess, load, served
from serving_soak import Soak


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--answers", type=int, default=3, help="per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--exit", default=None, help="policy; the model's thresholds")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="JSON to write")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts_of(options: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Different pieces of held-out text, one per answer of a round."""
    ids = tokenizer("\n".join(default_text("held_out").documents)[:400_000])["input_ids"]
    count, length = options.clients * options.answers, options.prompt_tokens
    stride = max(1, (len(ids) - length) // count)
    return [ids[number * stride : number * stride + length] for number in range(count)]


def alone(options: argparse.Namespace) -> None:
    """Rounds of the engine by itself: for every line on stdin, one line of figures on stdout."""
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    engine = Engine(model, tokenizer, max_requests=options.clients)
    params = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True, exit=options.exit)
    prompts = prompts_of(options, tokenizer)
    for _ in sys.stdin:
        started = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": sum(len(output.token_ids) for output in outputs), "seconds": seconds}), flush=True)


def compare(options: argparse.Namespace, server: ServerProcess, prompts: list[list[int]]) -> dict[str, Any]:
    """Rounds of the two, in turn; the first of each warms it up and finds no prefix, and does not count."""
    body = {"max_tokens": options.new_tokens, "ignore_eos": True, "temperature": 0}
    body |= {} if options.exit is None else {"exit": {"policy": options.exit}}
    bodies = [body | {"prompt": prompt} for prompt in prompts]
    command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
    control = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert control.stdin is not None
    assert control.stdout is not None
    ratios, firsts, served_speeds, engine_speeds = [], [], [], []
    for number in range(options.rounds + 1):
        control.stdin.write("\n")
        control.stdin.flush()
        figures = json.loads(control.stdout.readline())
        found = asyncio.run(load(server.url, options.clients, bodies))
        speed = figures["tokens"] / figures["seconds"]
        talk.print(f"engine alone {speed:.1f} tokens/s, served {found.tokens_per_second:.1f}")
        if number:
            ratios.append(found.tokens_per_second / speed)
            served_speeds.append(found.tokens_per_second)
            engine_speeds.append(speed)
            firsts += [answer.first for answer in found.answers]
    control.stdin.close()
    control.wait(60)
    firsts.sort()
    return {
        "engine_tokens_per_second": round(statistics.median(engine_speeds), 2),
        "served_tokens_per_second": round(statistics.median(served_speeds), 2),
        "served_over_engine": round(statistics.median(ratios), 4),
        "served_over_engine_rounds": [round(ratio, 4) for ratio in ratios],
        "first_token_seconds": {
            name: round(firsts[int(part * (len(firsts) - 1))], 4)
            for name, part in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("largest", 1.0))
        },
    }


def main() -> None:
    options = parse()
    if options.alone:
        alone(options)
        return
    prompts = prompts_of(options, AutoTokenizer.from_pretrained(options.model))
    arguments = ["--max-requests", str(options.clients), "--dtype", options.dtype, "--device", options.device]
    with served(options.model, *arguments) as server:
        if options.soak:
            soak = Soak(server, prompts, seed=options.seed, clients=options.clients, new_tokens=options.new_tokens)
            figures = asyncio.run(soak.run(options.minutes, options.requests))
        else:
            figures = compare(options, server, prompts)
    setup = {name: value for name, value in vars(options).items() if name not in ("output", "alone")}
    setup["model"] = Path(options.model).name
    facts = {
        **figures,
        "setup": setup,
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    text = json.dumps(facts, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
