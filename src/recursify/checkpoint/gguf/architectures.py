"""Architectures of llama.cpp that are read, and what sets each apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recursify.errors import UnsupportedModelError

from .file import GgufFile
from .rope import decimal

Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """Storage of one family by llama.cpp.

    Attributes:
        model_type: Family in transformers.
        epsilon: Field of the config that has the epsilon of the norms.
        layer_norm: The norms are LayerNorms, whose epsilon has another key.
        partial_rotary: A head may be rotated in part.
        permuted: Rows of the query and key maps are in the order of interleaved RoPE.
        offset_norms: Weights of norms are stored as ``1 + w``.
        rope_freqs: llama.cpp applies ``rope_freqs.weight``.
        more: Function that reads the keys of this architecture alone into fields of the config.
    """

    model_type: str
    epsilon: str = "rms_norm_eps"
    layer_norm: bool = False
    partial_rotary: bool = False
    permuted: bool = False
    offset_norms: bool = False
    rope_freqs: bool = False
    more: Callable[[GgufFile, Fields], Fields] = lambda file, fields: {}


def _layer_types(file: GgufFile, num_layers: int, period: int) -> list[str]:
    """Layers with a window; by default all but every ``period``-th."""
    pattern = file.own("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        pattern = [bool((layer + 1) % int(pattern)) if pattern else False for layer in range(num_layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _query_scale(fields: Fields, largest: int) -> float:
    """``query_pre_attn_scalar``, which no key has; llama.cpp recognizes the 27B models by their number of layers."""
    if fields["num_hidden_layers"] == largest:
        return fields["hidden_size"] // fields["num_attention_heads"]
    return fields["head_dim"]


def _gemma2(file: GgufFile, fields: Fields) -> Fields:
    theta = fields["rope_parameters"]["rope_theta"]
    if decimal(file.own("rope.freq_base_swa", theta)) != theta:
        raise UnsupportedModelError(f"'{file.path}' has another RoPE base in windows, which Gemma 2 does not have.")
    return {
        "sliding_window": int(file.own("attention.sliding_window", 4096)),
        "layer_types": _layer_types(file, fields["num_hidden_layers"], 2),
        "attn_logit_softcapping": decimal(file.own("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": decimal(file.own("final_logit_softcapping", 30.0)),
        "query_pre_attn_scalar": _query_scale(fields, 46),
    }


def _gemma3(file: GgufFile, fields: Fields) -> Fields:
    window = int(file.own("attention.sliding_window", 0))
    kinds = _layer_types(file, fields["num_hidden_layers"], 6)
    local = {"rope_type": "default", "rope_theta": decimal(file.own("rope.freq_base_swa", 10000.0))}
    return {
        # Without a window llama.cpp gives all layers full attention.
        "layer_types": kinds if window else ["full_attention"] * len(kinds),
        **({"sliding_window": window} if window else {}),
        # The factor of the scaling is that of the layers with full attention (llama.cpp, rope_freq_scale_train_swa).
        "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": decimal(file.own("final_logit_softcapping", 0.0)) or None,
        "query_pre_attn_scalar": _query_scale(fields, 62),
    }


def _phi3(file: GgufFile, fields: Fields) -> Fields:
    # 0 stands for none, by which Phi-4 differs from Phi-3.
    return {
        "sliding_window": int(file.own("attention.sliding_window", 0)) or None,
        "original_max_position_embeddings": int(
            file.own("rope.scaling.original_context_length", fields["max_position_embeddings"])
        ),
    }


def _gptneox(file: GgufFile, fields: Fields) -> Fields:
    return {"use_parallel_residual": bool(file.own("use_parallel_residual", True))}


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True, rope_freqs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", offset_norms=True),
    "gemma2": Architecture("gemma2", offset_norms=True, more=_gemma2),
    "gemma3": Architecture("gemma3_text", offset_norms=True, more=_gemma3),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", permuted=True),
    "phi3": Architecture("phi3", partial_rotary=True, more=_phi3),
    "gptneox": Architecture("gpt_neox", "layer_norm_eps", layer_norm=True, partial_rotary=True, more=_gptneox),
    "starcoder2": Architecture("starcoder2", "norm_epsilon", layer_norm=True),
}
"""Architectures that are read, by ``general.architecture``."""


def architecture_of(file: GgufFile) -> Architecture:
    """Architecture of an open file.

    Raises:
        UnsupportedModelError: It is not read.
    """
    if file.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"'{file.path}' has the architecture '{file.architecture}'. Those that are read from a .gguf are: "
            f"{', '.join(ARCHITECTURES)}. Convert the original checkpoint instead."
        )
    return ARCHITECTURES[file.architecture]
