"""Small engines over random models, and what they are compared with."""

from __future__ import annotations

import torch

from helpers.tiny_models import random_ids, tiny_config
from recursify.engine import Engine, SamplingParams
from recursify.modeling import LayerLayout, RecursiveConfig, RecursiveForCausalLM

SMALL = {"max_num_seqs": 4, "page_size": 4, "num_pages": 64, "chunk_size": 6, "max_num_batched_tokens": 24}


def small_engine(model, *tokenizer, **limits) -> Engine:
    """Pages and chunks of a few tokens, so that a short prompt takes several."""
    return Engine(model, *tokenizer, **{**SMALL, **limits})


def recursive(family="llama", recursions=2, ends=1, seed=0, **fields) -> RecursiveForCausalLM:
    """A random recursive model of six layers, its residuals and norms random too."""
    layout = LayerLayout.fold(
        6, recursions, fields.pop("sharing", "cycle"), num_prelude_layers=ends, num_coda_layers=ends
    )
    config = RecursiveConfig.from_dense(
        tiny_config(family, **fields.pop("dense", {})), layout, **{"lora_rank": 4, **fields}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RecursiveForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1 and "gemma" not in family))
    return model


def prompts(*lengths: int) -> list[list[int]]:
    return [random_ids(1, length, seed=length)[0].tolist() for length in lengths]


def greedy(model, prompt: list[int], new: int = 9, **arguments) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False, **arguments)[0, len(prompt) :].tolist()


def assert_same_as_generate(model, *lengths: int, **limits) -> Engine:
    """Prompts of ``lengths`` in one engine, which is returned, beside each alone in ``generate``."""
    engine = small_engine(model, **limits)
    outputs = engine.generate(prompts(*lengths), SamplingParams(max_tokens=9))
    assert [output.token_ids for output in outputs] == [greedy(model, each) for each in prompts(*lengths)]
    assert engine.kv_cache.num_used == 0
    return engine
