"""The trial of an unlisted family: its size is bounded, its structure and verdict are the model's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from recursify.convert import parity
from recursify.convert.parity import TRIAL_BYTES, _small_model, _trial_config, fold_exactly, require_family_parity
from recursify.errors import UnsupportedModelError

SIZES = {
    # hidden size, MLP, heads, key-value heads, layers
    "8B": (4096, 14336, 32, 8, 32),
    "32B, odd heads": (5120, 27648, 40, 8, 64),
    "70B": (8192, 28672, 64, 8, 80),
    "one key-value head": (8192, 24576, 64, 1, 40),
}


def wide(family: str, size: str, **fields) -> PreTrainedConfig:
    hidden_size, intermediate_size, heads, kv_heads, layers = SIZES[size]
    return AutoConfig.for_model(
        family,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=128256,
        **fields,
    )


def bytes_of(model) -> int:
    return sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["seed_oss", "olmo3", "stablelm", "glm4"])
@pytest.mark.parametrize("size", SIZES)
def test_trial_of_a_wide_model(family, size):
    """At most the bound in float32, with the heads' size and grouping of the model."""
    config = wide(family, size)
    small = _trial_config(copy.deepcopy(config))
    with torch.device("meta"):
        assert bytes_of(parity.MODEL_FOR_CAUSAL_LM_MAPPING[type(small)](small)) <= TRIAL_BYTES
    assert small.num_hidden_layers == 4
    assert small.hidden_size / small.num_attention_heads == config.hidden_size / config.num_attention_heads
    assert getattr(small, "head_dim", None) == getattr(config, "head_dim", None)
    if config.num_key_value_heads > 1:
        groups = config.num_attention_heads // config.num_key_value_heads
        assert small.num_attention_heads // small.num_key_value_heads == groups
    assert config.to_dict() == wide(family, size).to_dict()


def test_narrow_model_is_tried_as_it_is():
    """Only depth and vocabulary are cut where the width is within the bound."""
    config = AutoConfig.for_model("stablelm", hidden_size=256, intermediate_size=688, num_attention_heads=8)
    small = _trial_config(config)
    for field in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert getattr(small, field) == getattr(config, field)
    assert (small.num_hidden_layers, small.vocab_size) == (4, 256)


def test_copy_of_full_rank_is_bounded():
    """The recursive models of a trial are at most 2.5 times as large as the dense one."""
    dense = _small_model(
        AutoConfig.for_model("stablelm", hidden_size=256, intermediate_size=688, num_attention_heads=8)
    )
    assert bytes_of(fold_exactly(dense, 1)) == bytes_of(dense)
    assert bytes_of(fold_exactly(dense, 2)) <= 2.5 * bytes_of(dense)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("seed_oss", None),
        ("granite", "it changes the embeddings before its first layer"),
        ("cohere", "it changes the logits behind the LM head"),
    ],
)
def test_verdict_on_a_wide_model(family, reason):
    """That of the family, from a narrowed trial."""
    extra = {"embedding_multiplier": 12.0} if family == "granite" else {"pad_token_id": 0}
    config = wide(family, "8B", **extra)
    if reason is None:
        require_family_parity(config)
        return
    with pytest.raises(UnsupportedModelError, match=reason):
        require_family_parity(config)


def test_widths_that_cannot_be_built(monkeypatch):
    """They are left out; the narrowest of the others is tried where none is small enough."""
    config = wide("stablelm", "70B")
    count = parity._float32_bytes

    def refuse_halves(small: PreTrainedConfig) -> int:
        if small.num_attention_heads == 8:
            raise ValueError("at least 16 heads")
        return count(small)

    monkeypatch.setattr(parity, "TRIAL_BYTES", 1)
    assert _trial_config(config).num_attention_heads == 8
    monkeypatch.setattr(parity, "_float32_bytes", refuse_halves)
    assert _trial_config(config).num_attention_heads == 16
