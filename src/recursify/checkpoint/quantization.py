"""Recognition of quantized checkpoints, by config and by tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    config = fields.get("quantization_config") or fields.get("compression_config")
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else None
    evidence = f"quantization_config in config.json, method '{method}'" if config else _quantized_tensors(stored)
    if evidence is None:
        return
    remedy = REMEDIES.get(str(method))
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
        if last == "weight" and isinstance(info, str):
            return f"'{name}' is stored as {info}"
    return None
