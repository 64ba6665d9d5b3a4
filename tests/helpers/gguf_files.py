"""Small ``.gguf`` files, written the way llama.cpp's ``convert_hf_to_gguf.py`` writes them.

Compared with that converter (of llama-cpp-python 0.3.36) once: tensors and their values are the same for every family
and RoPE scaling of ``test_gguf.py``, and so are the keys of the architecture, except that some converters leave out
``vocab_size`` and what equals a default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}
"""Names of llama.cpp that differ from ``model_type``."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def byte_level_keys(pre: str = "smollm", **keys: Any) -> dict[str, Any]:
    """Tokenizer of all bytes, two merges, two control tokens and a user-defined one: 261 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", *alphabet, "he", "Ġ1", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 2 + [NORMAL] * 258 + [USER_DEFINED],
        "tokenizer.ggml.merges": ["h e", "Ġ 1"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
        **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
    }


def sentencepiece_keys(**keys: Any) -> dict[str, Any]:
    """SentencePiece tokenizer of a few pieces with scores, bytes and a user-defined token of two spaces."""
    pieces = ["▁", "a", "b", "ab", "▁a", "▁ab", "c", "bc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "  ", "<turn>"]
    scores = [0.0] * 259 + [-9.0, -10.0, -11.0, -2.0, -3.0, -1.0, -12.0, -0.5] + [-1000.0] * 2
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": (
            [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED, CONTROL]
        ),
        **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
    }


def write_gguf(
    path: Path,
    dense: PreTrainedModel,
    *,
    tokenizer: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    without: Iterable[str] = (),
    quantization: str | None = None,
) -> Path:
    """Write ``dense`` and return ``path``.

    Args:
        path: File to write.
        dense: Model of a family that llama.cpp has.
        tokenizer: Keys of the tokenizer; by default those of :func:`byte_level_keys`.
        keys: Further keys, or other values.
        tensors: Further tensors, or other values.
        without: Keys and tensors to leave out.
        quantization: Type of the matrices, instead of float32.
    """
    architecture = ARCHITECTURES.get(dense.config.model_type, dense.config.model_type)
    writer = GGUFWriter(path, architecture)
    own = {f"{architecture}.{name}": value for name, value in _metadata(dense.config).items()}
    for key, value in {**own, **(byte_level_keys() if tokenizer is None else tokenizer), **(keys or {})}.items():
        if key not in without:
            _add_key(writer, key, value)
    for name, tensor in {**_tensors(dense, architecture), **(tensors or {})}.items():
        if name in without:
            continue
        values = tensor.detach().float().contiguous().numpy()
        if quantization and tensor.ndim == 2:
            kind = GGMLQuantizationType[quantization]
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: Any) -> dict[str, Any]:
    heads, family = config.num_attention_heads, config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    if family == "gpt_neox":
        keys |= {"attention.layer_norm_epsilon": config.layer_norm_eps, "use_parallel_residual": True}
    elif family == "starcoder2":
        keys["attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        keys["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if family in ("gemma2", "gemma3_text", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window or 0
    if family == "gemma2":
        keys |= {"attn_logit_softcapping": config.attn_logit_softcapping}
        keys |= {"final_logit_softcapping": config.final_logit_softcapping}
    if family == "gemma3_text":
        keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return keys | _rope_keys(config, rope)


def _rope_keys(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    keys: dict[str, Any] = {}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for field, key in {
            "attention_factor": "attn_factor",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
        }.items():
            if field in rope:
                keys[f"rope.scaling.yarn_{key}"] = float(rope[field])
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        keys["rope.scaling.original_context_length"] = original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return keys


def _tensors(dense: PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    config = dense.config
    number = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, tensor in dense.named_parameters():
        module, _, kind = name.rpartition(".")
        tensors[f"{names.get_name(module)}.{kind}"] = _to_llama_cpp(name, tensor.detach(), config)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(config.head_dim, rope)
    if rope["rope_type"] == "longrope":
        tensors["rope_factors_long.weight"] = torch.tensor(rope["long_factor"])
        tensors["rope_factors_short.weight"] = torch.tensor(rope["short_factor"])
    return tensors


def _to_llama_cpp(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    family, heads = config.model_type, config.num_attention_heads
    if family in ("llama", "mistral", "smollm3") and (".q_proj." in name or ".k_proj." in name):
        heads = heads if ".q_proj." in name else config.num_key_value_heads
        split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return split.swapaxes(1, 2).reshape(tensor.shape)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if family == "gpt_neox" and ".query_key_value." in name:
        split = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return torch.cat([split[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    return tensor


def llama3_factors(dim: int, rope: dict[str, Any]) -> torch.Tensor:
    """``rope_freqs.weight``, by the lines of llama.cpp's converter."""
    factors = []
    for freq in 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength, original = 2 * math.pi / freq, rope["original_max_position_embeddings"]
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return torch.tensor(np.array(factors, dtype=np.float32))
