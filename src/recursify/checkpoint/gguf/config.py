"""Config of a dense family from the metadata of a ``.gguf``."""

from __future__ import annotations

import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from recursify.errors import CheckpointError, UnsupportedModelError

from .architectures import Architecture, Fields
from .file import GgufFile
from .rope import ROPE_FREQS, decimal, read_rope
from .vocabulary import special_ids

NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
"""Keys that are accepted with the value that changes nothing."""

HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "mm.tokens_per_image")
"""Keys that describe how the file was made, or what is done with images."""

BIASES = {
    "attention_bias": re.compile(r"blk\.\d+\.attn_(q|k|v|qkv|output)\.bias"),
    "mlp_bias": re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias"),
}
"""Fields of a config that GGUF has no key for, and the tensors that imply them."""


def read_config(file: GgufFile, architecture: Architecture) -> PreTrainedConfig:
    """Config of the model in ``file``; every key of the architecture is used, known to be harmless, or refused.

    Raises:
        CheckpointError: A key or the embedding is missing, or contradicts another.
        UnsupportedModelError: A key is unknown, or its value is not what the family has in transformers.
    """
    fields = _shape_fields(file)
    fields[architecture.epsilon] = decimal(
        _need(file, "attention.layer_norm_epsilon" if architecture.layer_norm else "attention.layer_norm_rms_epsilon")
    )
    fields["rope_parameters"] = _rope(file, architecture, fields["head_dim"])
    fields |= architecture.more(file, fields)
    fields |= special_ids(file)
    default = AutoConfig.for_model(architecture.model_type)
    for name, pattern in BIASES.items():
        if hasattr(default, name):
            fields[name] = any(pattern.fullmatch(tensor) for tensor in file.shapes)
    if not hasattr(default, "head_dim") and fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]:
        del fields["head_dim"]
    _refuse_unknown(file)
    config = AutoConfig.for_model(architecture.model_type, **fields)
    config.architectures = None
    return config


def _shape_fields(file: GgufFile) -> Fields:
    """Fields that all families have."""
    if "token_embd.weight" not in file.shapes:
        raise CheckpointError(f"'{file.path}' lacks the tensor 'token_embd.weight'. Fetch the model again.")
    rows = file.shapes["token_embd.weight"][0]
    if (stated := file.own("vocab_size", rows)) != rows:
        raise CheckpointError(f"'{file.path}' states a vocabulary of {stated}, but its embedding has {rows} rows.")
    heads = _uniform(file, "attention.head_count")
    hidden = int(_need(file, "embedding_length"))
    head_dim = int(file.own("attention.key_length", hidden // heads))
    if (value_dim := int(file.own("attention.value_length", head_dim))) != head_dim:
        raise UnsupportedModelError(
            f"'{file.path}' has keys of {head_dim} and values of {value_dim} dimensions, which the family does not."
        )
    return {
        "vocab_size": rows,
        "num_hidden_layers": int(_need(file, "block_count")),
        "max_position_embeddings": int(_need(file, "context_length")),
        "hidden_size": hidden,
        "intermediate_size": _uniform(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _uniform(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }


def _rope(file: GgufFile, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    rotary_dim = int(file.own("rope.dimension_count", head_dim))
    if ROPE_FREQS in file.shapes and not architecture.rope_freqs:
        raise UnsupportedModelError(f"'{file.path}' has {ROPE_FREQS}, which {architecture.model_type} does not.")
    rope = read_rope(file, rotary_dim)
    if architecture.partial_rotary:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    elif rotary_dim != head_dim:
        raise UnsupportedModelError(
            f"'{file.path}' rotates {rotary_dim} of {head_dim} dimensions of a head (rope.dimension_count), which "
            f"{architecture.model_type} does not."
        )
    return rope


def _need(file: GgufFile, key: str) -> Any:
    value = file.own(key)
    if value is None:
        raise CheckpointError(f"'{file.path}' lacks the key '{file.architecture}.{key}'. Fetch the model again.")
    return value


def _uniform(file: GgufFile, key: str, default: int | None = None) -> int:
    """A number, or a list with one for each layer if they are all the same."""
    value = _need(file, key) if default is None else file.own(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UnsupportedModelError(
            f"'{file.path}' has layers of different shapes ('{file.architecture}.{key}' is {value}). All layers of a "
            f"supported family are alike."
        )
    return int(values.pop())


def _refuse_unknown(file: GgufFile) -> None:
    for key, neutral in NEUTRAL.items():
        if (value := file.own(key, neutral)) != neutral:
            raise UnsupportedModelError(
                f"'{file.path}' has '{file.architecture}.{key}' = {value}, which is not supported (only {neutral} is)."
            )
    for key in HARMLESS:
        file.own(key)
    if unknown := file.unread():
        raise UnsupportedModelError(
            f"'{file.path}' has keys of unknown effect: {', '.join(unknown)}. Reading it without them would make "
            f"another model; convert the original checkpoint instead."
        )
