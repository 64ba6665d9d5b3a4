"""Families whose attention differs from Llama's in ways that no config field tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.small_engine import assert_same_as_generate, prompts, small_engine
from helpers.tiny_models import SMALL, tiny_dense
from recursify.engine import Engine, SamplingParams
from recursify.errors import EngineError, UnsupportedModelError
from recursify.modeling import LayerLayout, RecursiveConfig, RecursiveForCausalLM

MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"] * 2

CASES: dict[str, dict[str, Any]] = {
    "nemotron": {},
    "stablelm": {"head_dim": None},
    "stablelm with norms of heads": {"head_dim": None, "qk_layernorm": True, "use_qkv_bias": True},
    "exaone4": {"sliding_window": 8, "layer_types": WINDOWS},
    "exaone4 alternating": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 3},
    "youtu": {**MLA, "num_key_value_heads": 4, "head_dim": None},
    "olmo3": {"sliding_window": 8, "layer_types": WINDOWS},
}
"""Layers that pass nothing on to their attention, RoPE in windowed layers only, keys and values of unlike sizes."""


def config_of(case: str, **fields):
    given = {**SMALL, **CASES.get(case, {}), **fields}
    return AutoConfig.for_model(case.split()[0], **{name: value for name, value in given.items() if value is not None})


def randomize(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model.eval()


def dense_of(case: str, **fields):
    return randomize(AutoModelForCausalLM.from_config(config_of(case, **fields)))


def recursive_of(case: str):
    layout = LayerLayout.fold(6, 2, "cycle", num_prelude_layers=1, num_coda_layers=1)
    return randomize(RecursiveForCausalLM(RecursiveConfig.from_dense(config_of(case), layout, lora_rank=4)))


@pytest.mark.parametrize("case", CASES)
def test_models_in_pages(case):
    """Dense and recursive, prompts of several chunks and more of them than run at once."""
    assert_same_as_generate(dense_of(case), 3, 17, 9, 6, max_num_seqs=3)
    assert_same_as_generate(recursive_of(case), 3, 17, 9, 6, max_num_seqs=3)


@pytest.mark.parametrize("case", CASES)
def test_rows_at_unlike_depths(case):
    """Forced exits put rows of all depths into one call; a batch generates what its requests generate alone."""
    model, asked = recursive_of(case), prompts(5, 11, 4)
    params = [SamplingParams(max_tokens=9, forced_depths=table) for table in ((0, 1), (1, 0, 0), (1,))]
    together = small_engine(model, max_num_seqs=3).generate(asked, params)
    alone = [Engine(model, max_num_seqs=1).generate([each], its)[0] for each, its in zip(asked, params, strict=True)]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert together[0].depths == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_rope_in_windowed_layers_in_bfloat16():
    """EXAONE 4's block rotates at one depth and not at the other: the likeliest token of ``forward`` is chosen."""
    model, (prompt,) = recursive_of("exaone4 alternating").bfloat16(), prompts(9)
    (output,) = small_engine(model, num_pages=128).generate([prompt], SamplingParams(max_tokens=40))
    ids = torch.tensor([prompt + output.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * logits.abs().max(), "no other but near ties"


def test_pages_are_as_large_as_keys_and_values():
    """Not as the config's head size: 4 heads of 12 and of 6."""
    engine = small_engine(dense_of("youtu"), num_pages=8)
    layer = engine.decoder.block[0]
    assert layer.keys.shape == (8, 4, 4, 12)
    assert layer.values.shape == (8, 4, 4, 6)
    assert engine.kv_cache.num_bytes == 6 * 8 * 4 * 4 * (12 + 6) * 4
    few = Engine(dense_of("youtu"), page_size=4, kv_cache_memory_bytes=engine.kv_cache.num_bytes)
    assert few.kv_cache.pools[0].num_pages == 8


def test_kernels_that_expect_one_size_are_not_used():
    with pytest.raises(EngineError, match="device loop does not support keys and values of unlike sizes"):
        small_engine(dense_of("youtu"), device_loop=True)
    assert small_engine(dense_of("youtu")).implementation == "reference"


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("diffllama", {}, "a DiffLlamaAttention attends more than once"),
        ("granite_swa", {"sliding_window": 8}, "GraniteSWAAttention passes 's_aux' to its attention function"),
        ("minimax", {"num_local_experts": 2}, "Layer 1 has 'linear_attention', and only full"),
        ("nanochat", {}, "does not reproduce this nanochat model"),
    ],
)
def test_other_attention_is_refused_by_name(case, fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        small_engine(dense_of(case, **fields))


def test_attention_without_an_attention_function_is_refused():
    """Old families compute it by themselves."""

    class OwnAttention(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    model = tiny_dense("llama")
    model.model.layers[2].self_attn = OwnAttention()
    with pytest.raises(UnsupportedModelError, match="this llama model: OwnAttention computes attention by itself"):
        Engine(model)


def test_code_from_a_checkpoint_is_refused():
    """Its classes are not recursify's own, which the engine takes apart."""
    model = recursive_of("olmo3")
    remote = type("RecursiveForCausalLM", (torch.nn.Module,), {"config": model.config, "model": model.model})()
    with pytest.raises(UnsupportedModelError, match="loaded with the code in its checkpoint"):
        Engine(remote)
