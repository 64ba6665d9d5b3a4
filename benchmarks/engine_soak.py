"""Soak test of the engine with ten thousand requests, some cancelled: memory, pages, and requests without an end.

::

    python benchmarks/engine_soak.py

A small random recursive model with exits; prompts, lengths, policies, arrivals and cancellations are random. Every
thousand requests a line has the memory of the process, the number of live tensors, and the pages in use.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import random
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import LlamaConfig

from quality import commit
from recursify.cli.report import talk
from recursify.engine import Engine, RequestOutput, SamplingParams
from recursify.modeling import ExitSettings, LayerLayout, RecursiveConfig, RecursiveForCausalLM, make_policy

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("requests", "answered", "cancelled", "new_tokens", "preemptions"),
    *("memory_mib", "tensors", "pages_in_use", "live", "commit", "date"),
)


def small_model() -> RecursiveForCausalLM:
    """Make a random model: a prelude of one layer, a shared block of one layer run three times, a coda of one layer."""
    dense = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    layout = LayerLayout.fold(5, 3, num_prelude_layers=1, num_coda_layers=1)
    torch.manual_seed(0)
    return RecursiveForCausalLM(RecursiveConfig.from_dense(dense, layout, lora_rank=4, exit_head="shared")).eval()


def memory_mib() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def draw_params(draw: random.Random) -> SamplingParams:
    exits = draw.choice((None, "confidence", "saturation", "head"))
    settings = None if exits is None else ExitSettings(make_policy(exits, draw.uniform(0, 0.9)), max_pending=8)
    temperature = draw.choice((0.0, 0.8))
    return SamplingParams(
        max_tokens=draw.randint(1, 40), exit=settings, temperature=temperature, seed=draw.randrange(99)
    )


def main() -> None:
    """Run, and write the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "engine_soak.csv")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    ended: dict[str, int] = {"stop": 0, "length": 0, "cancelled": 0}

    def count_end(output: RequestOutput) -> None:
        if output.finish_reason is not None:
            ended[output.finish_reason] += 1

    engine = Engine(small_model(), max_num_seqs=32, num_pages=72, max_model_len=96, chunk_size=24, on_token=count_end)
    prefixes = [[draw.randrange(512) for _ in range(40)] for _ in range(8)]
    stamp = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
    lines = []
    for number in range(1, arguments.requests + 1):
        prompt = draw.choice(prefixes)[: draw.randint(1, 40)] + [
            draw.randrange(512) for _ in range(draw.randint(1, 12))
        ]
        engine.add(prompt, draw_params(draw))
        if draw.random() < 0.2 and engine.requests:
            engine.cancel(draw.choice(list(engine.requests)))
        while len(engine.requests) > draw.randint(8, 64):
            engine.step()
        if number % max(1, arguments.requests // 10) == 0:
            while engine.has_work:
                engine.step()
            gc.collect()
            tensors = sum(isinstance(entry, torch.Tensor) for entry in gc.get_objects())
            line = {
                "requests": number,
                "answered": ended["stop"] + ended["length"],
                "cancelled": ended["cancelled"],
                "new_tokens": engine.stats.new_tokens,
                "preemptions": engine.stats.preemptions,
                "memory_mib": round(memory_mib(), 1),
                "tensors": tensors,
                "pages_in_use": engine.kv_cache.num_used,
                "live": len(engine.requests),
                **stamp,
            }
            talk.print(str(line))
            lines.append(line)
    unended = arguments.requests - sum(ended.values())
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    talk.print(f"{unended} requests did not end")
    if unended or lines[-1]["pages_in_use"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
