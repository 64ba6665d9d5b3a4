"""Random schedules: models, requests, engines and what happens to them, each made of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import torch

from helpers.tiny_models import random_ids, tiny_config
from recursify.engine import Engine, SamplingParams
from recursify.evaluation.exit_thresholds import exit_contexts
from recursify.modeling import (
    ExitSettings,
    LayerLayout,
    RecursiveConfig,
    RecursiveForCausalLM,
    RoutedCache,
    make_policy,
)

FAMILIES = ("llama", "gemma2", "qwen3", "gpt_neox")
NEW_TOKENS = 7
NUM_PROMPTS = 6


@cache
def model_of(family: str, kv: str) -> RecursiveForCausalLM:
    """A random recursive model with prelude, coda and residuals; exit heads, or routers that split tokens."""
    # Gemma 2 alternates windows, so that with three layers in the block depths differ in theirs.
    layers, recursions = (8, 2) if family == "gemma2" else (5, 3)
    if family == "gemma2" and kv == "shared":
        layers = 6  # keys that are read at another depth need the same window there
    layout = LayerLayout.fold(layers, recursions, num_prelude_layers=1, num_coda_layers=1)
    dense = tiny_config(family, num_hidden_layers=layout.num_layers)
    with torch.random.fork_rng():
        torch.manual_seed(len(family) + len(kv))
        fields = {"exit_head": "shared"} if kv not in ("recursion_wise", "shared") else {}
        model = RecursiveForCausalLM(RecursiveConfig.from_dense(dense, layout, lora_rank=4, **fields)).eval()
        if kv in ("recursion_wise", "shared"):
            kind = "token_choice" if family == "qwen3" else "expert_choice"
            model.add_routers(kind, router_kv=kv)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(torch.randn_like(parameter) * (0.5 if "router" in name or "test" in name else 0.2))
            if parameter.ndim == 1:
                parameter.data.add_(0.0 if "gemma" in family else 1.0)
    return model


def prompt(number: int) -> tuple[int, ...]:
    """One of a few prompts; some begin alike."""
    ids = random_ids(1, 3 + 5 * number, seed=number % 2)[0].tolist()
    return tuple(ids)


@cache
def median_thresholds(family: str, kv: str, name: str) -> tuple[float, ...]:
    """Per exit, the confidence that half of some drawn tokens have: at those, tokens exit after all depths."""
    model = model_of(family, kv)
    with torch.no_grad():
        boundaries, _ = exit_contexts(model, random_ids(1, 64, seed=9), None)
    policy = make_policy(name, 0.5)
    return tuple(float(policy.confidence(boundary).float().median()) for boundary in boundaries)


def settings(number: int, family: str, kv: str) -> ExitSettings | None:
    """One of a few exit settings; None for full depth."""
    model = model_of(family, kv)
    if model.config.router is not None or number == 0:
        return None
    if number == 6:
        return ExitSettings(make_policy("fixed", 0.0), kv=kv)
    name, more = (
        ("confidence", {}),
        ("saturation", {"min_depth": 1 if model.config.num_recursions > 2 else 0}),
        ("head", {"max_pending": 2}),
        ("divergence", {}),
        ("entropy", {"decay": 0.1}),
    )[number - 1]
    return ExitSettings(make_policy(name, median_thresholds(family, kv, name)), kv=kv, **more)


NUM_SETTINGS = 7


@cache
def expected(family: str, kv: str, which: int, how: int) -> tuple[list[int], list[int]]:
    """Output of ``generate`` for one prompt alone: tokens, and the depth after which each exited."""
    model = model_of(family, kv)
    ids, exits = torch.tensor([prompt(which)]), settings(how, family, kv)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if model.config.router is not None:
        cache = RoutedCache(model.config)
        tokens = model.generate(ids, **arguments, past_key_values=cache)[0, ids.shape[1] :].tolist()
        return tokens, cache.depths[0, ids.shape[1] - 1 :].tolist()
    if exits is None:
        tokens = model.generate(ids, **arguments)[0, ids.shape[1] :].tolist()
        return tokens, [model.config.num_recursions - 1] * len(tokens)
    output = model.generate(ids, **arguments, exit_policy=exits, return_dict_in_generate=True)
    return output.sequences[0, ids.shape[1] :].tolist(), output.exit_depths[0].tolist()


@dataclass
class ScheduledRequest:
    """One request of a schedule."""

    which: int
    how: int
    arrives: int
    cancelled: int | None


def run_schedule(family: str, kv: str, seed: int) -> tuple[Engine, int]:
    """Run one random schedule and compare its outputs; returns the engine and the number of complete outputs."""
    draw = random.Random(f"{family} {kv} {seed}")
    model = model_of(family, kv)
    longest = len(prompt(NUM_PROMPTS - 1)) + NEW_TOKENS
    page_size = draw.choice((1, 2, 3, 5, 16))
    pages = -(-longest // page_size)
    max_num_seqs = draw.randint(1, 4)
    lockstep = draw.random() < 0.15
    engine = Engine(
        model,
        kv=kv,
        force_kv=True,
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        num_pages=draw.choice((pages, pages + 2, 2 * pages, 3 * pages)),
        chunk_size=draw.choice((1, 3, 7, 64)),
        max_num_batched_tokens=draw.choice((max_num_seqs + 1, 16, 64)) + max_num_seqs,
        max_model_len=longest,
        enable_prefix_caching=draw.random() < 0.7,
        lockstep=lockstep,
        async_output=draw.random() < 0.5,
        device_loop=not lockstep and model.config.router is None and draw.random() < 0.5,
        num_device_steps=draw.choice((1, 2, 5)),
    )
    asked = [
        ScheduledRequest(
            draw.randrange(NUM_PROMPTS),
            draw.randrange(NUM_SETTINGS),
            draw.choice((0, 0, draw.randrange(12))),
            draw.randrange(14) if draw.random() < 0.15 else None,
        )
        for _ in range(draw.randint(2, 6))
    ]
    outputs: dict[int, object] = {}
    ids: dict[int, int] = {}
    whole, iteration = 0, 0
    while len(ids) < len(asked) or engine.has_work:
        for number, request in enumerate(asked):
            if request.arrives == iteration:
                params = SamplingParams(max_tokens=NEW_TOKENS, exit=settings(request.how, family, kv))
                ids[number] = engine.add(prompt(request.which), params)
                outputs[number] = engine.requests[ids[number]].output
            if request.cancelled == iteration and number in ids:
                engine.cancel(ids[number])
        engine.step()
        iteration += 1
        assert iteration < 2000, "the engine does not come to an end"
    for number, request in enumerate(asked):
        tokens, depths = expected(family, kv, request.which, request.how)
        output = outputs[number]
        count = len(output.token_ids)
        assert output.finish_reason in ("length", "cancelled")
        assert (output.token_ids, output.depths) == (tokens[:count], depths[:count]), (seed, request)
        if output.finish_reason == "length":
            assert count == NEW_TOKENS
            whole += 1
    assert engine.kv_cache.num_used == 0
    return engine, whole
