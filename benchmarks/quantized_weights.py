"""Rounding of a model's weights to a quantization of ``.gguf`` files, and the bytes that they take.

The ``gguf`` package quantizes to Q8_0, Q5_0, Q5_1, Q4_0 and Q4_1, and dequantizes the K-quants without making them. As
llama.cpp does, matrices are quantized, embedding and head included, and vectors stay in float32.
"""

from __future__ import annotations

import gguf
import torch
from torch import Tensor, nn

VECTORS = ("norm", "bias")
"""Parts of the names of parameters that are vectors, of one layer or of several depths."""

ELEMENTS_AT_ONCE = 2**22


def is_matrix(name: str, parameter: Tensor, kind: gguf.GGMLQuantizationType) -> bool:
    """True for a parameter that is stored quantized."""
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    is_vector = parameter.ndim < 2 or any(part in name for part in VECTORS)
    return not is_vector and parameter.shape[-1] % block_size == 0


@torch.no_grad()
def quantize_(model: nn.Module, kind_name: str) -> int:
    """Round the weights of ``model`` in place to what the quantization can represent.

    Returns:
        Bytes of all stored parameters; tied ones count once.
    """
    kind = gguf.GGMLQuantizationType[kind_name]
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = 0
    for name, parameter in model.named_parameters():
        if not is_matrix(name, parameter, kind):
            num_bytes += 4 * parameter.numel()
            continue
        rows = parameter.data.view(-1, parameter.shape[-1])
        for chunk in rows.split(max(1, ELEMENTS_AT_ONCE // rows.shape[1])):
            values = gguf.dequantize(gguf.quantize(chunk.numpy(), kind), kind)
            chunk.copy_(torch.from_numpy(values))
        num_bytes += parameter.numel() // block_size * type_size
    return num_bytes
