"""RoPE that depends on the length of a request, in the engine: each request is rotated as if it ran alone."""

from __future__ import annotations

import pytest
import torch

from helpers.rope_types import LIMIT, MODELS, with_rope
from helpers.small_engine import recursive, small_engine
from helpers.tiny_models import random_ids, tiny_dense
from recursify.convert.parity import fold_exactly
from recursify.engine import SamplingParams
from recursify.errors import EngineError

NEW = 12
DEPENDENT = [("llama", "longrope"), ("phi3", "longrope")]


def texts(*lengths: int) -> list[list[int]]:
    """Prompts that begin alike."""
    return [random_ids(1, 60, seed=3)[0, :length].tolist() for length in lengths]


def alone(make, prompts: list[list[int]], family: str = "llama") -> list[list[int]]:
    """Continuations of each prompt by ``generate`` of a new model.

    Phi-3 starts again at the limit, so uncached is the same; transformers before 5.24 fails to.
    """
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "use_cache": family != "phi3"}
    return [make().generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist() for ids in prompts]


def run(engine, prompts: list[list[int]], **params) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(prompts, SamplingParams(max_tokens=NEW, **params))]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("family", "name"), MODELS)
def test_requests_of_unlike_lengths(family, name, fold):
    """Short, across the limit and beyond it, side by side, in chunks, twice, with and without cached prefixes."""
    fields = with_rope(family, name)
    dense = tiny_dense(family, **fields)
    engine = small_engine(fold_exactly(dense, 1) if fold else dense, enable_prefix_caching=True, num_pages=128)
    prompts = texts(*((5, 12, 9) if name == "dynamic" else (5, 20, 33, 40, 12, 23)))
    wanted = alone(lambda: tiny_dense(family, **fields), prompts, family)
    assert run(engine, prompts) == wanted
    assert run(engine, prompts[::-1]) == wanted[::-1]
    assert engine.stats.cached_tokens > 0
    assert engine.kv_cache.num_used == 0


@pytest.mark.parametrize(("family", "name"), DEPENDENT)
def test_recursions_and_preemption(family, name):
    """A recursive model with few pages: requests are preempted below and beyond the limit."""
    model = recursive(family, dense=with_rope(family, name))
    engine = small_engine(model, num_pages=14, enable_prefix_caching=True)
    prompts = texts(20, 30, 9, 22)
    assert run(engine, prompts) == alone(lambda: model, prompts, family)
    assert engine.scheduler.preemptions


@pytest.mark.parametrize(("family", "name"), DEPENDENT)
def test_early_exits_across_the_limit(family, name):
    """A batch generates what its requests generate alone, tokens and depths; deferred tokens keep their rotation."""
    model = recursive(family, dense=with_rope(family, name))
    params = {"forced_depths": (0, 1, 0, 0)}
    prompts = texts(18, 30, 6)
    together = small_engine(model, num_pages=128).generate(prompts, SamplingParams(max_tokens=NEW, **params))
    for prompt, output in zip(prompts, together, strict=True):
        (single,) = small_engine(model).generate([prompt], SamplingParams(max_tokens=NEW, **params))
        assert (output.token_ids, output.depths) == (single.token_ids, single.depths)
        assert output.depths == [1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_the_device_loop():
    """It refuses such a model by name, and takes it with requests that stay within the limit."""
    fields = with_rope("phi3", "longrope")
    model = recursive("phi3", dense=fields)
    with pytest.raises(EngineError, match=rf"does not support RoPE that depends on the length .*max_model_len={LIMIT}"):
        small_engine(model, device_loop=True)
    engine = small_engine(model, device_loop=True, max_model_len=LIMIT)
    prompts = texts(5, 12, 9)
    assert run(engine, prompts) == alone(lambda: model, prompts)


def test_what_longer_texts_leave_behind():
    """``dynamic`` RoPE keeps the frequencies of the longest text; the engine is not affected."""
    model = recursive("llama", dense=with_rope("llama", "dynamic"))
    prompts = texts(11)
    wanted = alone(lambda: model, prompts)
    with torch.no_grad():
        model(random_ids(1, 3 * LIMIT))
    engine = small_engine(model, max_model_len=LIMIT)
    with torch.no_grad():
        model(random_ids(1, 3 * LIMIT))
    assert run(engine, prompts) == wanted
