"""Quantized checkpoints: recognized by config and by tensors, refused, or dequantized while they are read (FP8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recursify.errors import UnsupportedModelError

from .shards import TensorInfo

SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_packed",
    "input_scale",
    "activation_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "SCB",
    "absmax",
    "quant_map",
    "quant_state",
    "qdata",
)
"""Last parts of the names of tensors that only quantized checkpoints have."""

FP8_SCALE = "_scale_inv"
"""End of the names of the scales of FP8 weights, after the names of the weights."""

REMEDIES = {
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
    "compressed-tensors": "quantization_config=CompressedTensorsConfig(dequantize=True)",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True)",
}
"""Argument of transformers' ``from_pretrained`` that dequantizes, by method."""


def require_unquantized(fields: dict[str, Any], stored: dict[str, TensorInfo | str], folder: Path) -> None:
    """Refuse a checkpoint whose weights are not what their names say.

    Args:
        fields: Contents of ``config.json``.
        stored: Tensors on disk; a name instead of a dtype that is not floating-point.
        folder: Folder of the model.

    Raises:
        UnsupportedModelError: The config has a ``quantization_config``, or the tensors are those of a quantized model.
    """
    method = quant_method(fields)
    evidence = f"quantization_config in config.json, method '{method}'" if method else _quantized_tensors(stored)
    if evidence is None:
        return
    # transformers divides an uneven weight into even blocks, which are not those that it was quantized in.
    remedy = None if _uneven_weight(fields, stored) else REMEDIES.get(method or "")
    how = f"by transformers' from_pretrained(..., {remedy})" if remedy else "by the library that quantized it"
    raise UnsupportedModelError(
        f"'{folder}' is quantized ({evidence}), and only plain weights can be shared. Convert the model that it was "
        f"made from, or dequantize it {how}, save that, and convert it."
    )


def _quantized_tensors(stored: dict[str, TensorInfo | str]) -> str | None:
    """Description of the first tensor that only a quantized model has; None if there is none."""
    for name, info in sorted(stored.items()):
        last = name.replace(":", ".").rpartition(".")[2]
        if last in SCALES:
            return f"it has the tensor '{name}'"
        # Older checkpoints have masks of integers, too.
        if last == "weight" and (isinstance(info, str) or info.dtype.itemsize == 1):
            return f"'{name}' is stored as {info if isinstance(info, str) else str(info.dtype).removeprefix('torch.')}"
    return None


def quant_method(fields: dict[str, Any]) -> str | None:
    """Quantization method that ``config.json`` names; None if it has no ``quantization_config``."""
    config = fields.get("quantization_config") or fields.get("compression_config")
    if not config:
        return None
    return str(config.get("quant_method", "unknown")) if isinstance(config, dict) else "unknown"


def fp8_scales(fields: dict[str, Any], stored: dict[str, TensorInfo | str]) -> dict[str, str]:
    """Names of the scales of FP8 weights by the names of the weights; empty if the model is not what we dequantize.

    Every weight that is float8 has to have a scale of two axes that divide its own, into the blocks of the config if it
    states their size, nothing else may be quantized, and the config has to say so.
    """
    if quant_method(fields) != "fp8" or _uneven_weight(fields, stored):
        return {}
    scales = {name.removesuffix(FP8_SCALE): name for name in stored if name.endswith(FP8_SCALE)}
    rest = {name: info for name, info in stored.items() if name not in scales and name not in scales.values()}
    if _quantized_tensors(rest) or not all(_is_block_scaled(stored.get(w), stored[s]) for w, s in scales.items()):
        return {}
    return scales


def _is_block_scaled(weight: TensorInfo | str | None, scale: TensorInfo | str) -> bool:
    if not isinstance(weight, TensorInfo) or not isinstance(scale, TensorInfo):
        return False
    return (
        weight.dtype == torch.float8_e4m3fn
        and len(scale.shape) == len(weight.shape) == 2
        and all(size % blocks == 0 for size, blocks in zip(weight.shape, scale.shape, strict=True))
    )


def _uneven_weight(fields: dict[str, Any], stored: dict[str, TensorInfo | str]) -> str | None:
    """Name of an FP8 weight that blocks of the config's size do not divide evenly; None if there is none."""
    config = fields.get("quantization_config")
    size = config.get("weight_block_size") if isinstance(config, dict) else None
    for name, info in stored.items():
        scale = stored.get(f"{name}{FP8_SCALE}")
        if size and isinstance(info, TensorInfo) and isinstance(scale, TensorInfo) and len(scale.shape) == 2:
            axes = zip(info.shape, scale.shape, size, strict=False)
            if any(blocks > 1 and length != blocks * block for length, blocks, block in axes):
                return name
    return None


def dequantized_headers(
    stored: dict[str, TensorInfo | str], scales: dict[str, str], dtype: torch.dtype
) -> dict[str, TensorInfo | str]:
    """``stored`` without ``scales``, and with the weights that they belong to in ``dtype``."""
    plain: dict[str, TensorInfo | str] = {}
    for name, info in stored.items():
        if name not in scales.values():
            plain[name] = TensorInfo(info.shape, dtype) if name in scales and isinstance(info, TensorInfo) else info
    return plain


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 ``weight [O, I]`` times its ``scale [o, i]`` by blocks, in float32 (DeepSeek-V3, arXiv 2412.19437)."""
    for axis, blocks in enumerate(scale.shape):
        scale = scale.repeat_interleave(weight.shape[axis] // blocks, dim=axis)
    return weight.float() * scale.float()
