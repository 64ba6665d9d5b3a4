"""RoPE of a ``.gguf`` as transformers' ``rope_parameters``: base, and linear, YaRN, Llama 3 and LongRoPE scaling.

The meaning of the keys is that of llama.cpp's converter and loader (``load_hparams``, ``llama_context``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recursify.errors import UnsupportedModelError

from .file import GgufFile

ROPE_FREQS = "rope_freqs.weight"
"""Tensor with the divisor of each frequency, by which Llama 3's scaling is stored."""

ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors with the divisors of LongRoPE."""

ROPE_TENSORS = frozenset({ROPE_FREQS, ROPE_LONG, ROPE_SHORT})

PUBLISHED_LLAMA3 = (1.0, 4.0, 8192.0)
"""``low_freq_factor``, ``high_freq_factor`` and original context of every Llama 3 by Meta."""


def decimal(value: float) -> float:
    """The shortest decimal of a 32-bit float: 1e-5 is stored as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_rope(file: GgufFile, rotary_dim: int) -> dict[str, Any]:
    """Entry ``rope_parameters`` of the config.

    Args:
        file: The open file; the keys read are marked.
        rotary_dim: Number of rotated dimensions of a head.

    Raises:
        UnsupportedModelError: A scaling that transformers does not have, or parameters that exclude each other.
    """
    kind = str(file.own("rope.scaling.type", "linear"))  # llama.cpp's default, with factor 1
    factor, old_factor = file.own("rope.scaling.factor"), file.own("rope.scale_linear")
    factor = decimal(factor if factor is not None else old_factor or 1.0) or 1.0
    original = int(file.own("rope.scaling.original_context_length", file.own("context_length", 0)))
    attention = decimal(file.own("rope.scaling.attn_factor", 1.0))
    file.own("rope.scaling.finetuned")  # how the weights were trained, without effect on the computation
    rope: dict[str, Any] = {"rope_theta": decimal(file.own("rope.freq_base", 10000.0))}
    if rotary_factors := ROPE_TENSORS & set(file.shapes):
        return rope | _read_factors(file, rotary_factors, kind, factor, original, attention, rotary_dim, rope)
    if kind == "yarn":
        return rope | _read_yarn(file, factor, original, attention)
    if attention != 1.0:
        raise UnsupportedModelError(
            f"'{file.path}' has rope.scaling.attn_factor {attention} with RoPE scaling '{kind}', which transformers "
            f"does not have."
        )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope | {"rope_type": "default"}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    raise UnsupportedModelError(
        f"'{file.path}' has rope.scaling.type '{kind}'"
        + (" without the tensors that it needs." if kind == "longrope" else ", which is not known.")
    )


def _read_yarn(file: GgufFile, factor: float, original: int, attention: float) -> dict[str, Any]:
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if (extrapolation := file.own("rope.scaling.yarn_ext_factor")) not in (None, -1.0, 1.0):
        raise UnsupportedModelError(
            f"'{file.path}' has rope.scaling.yarn_ext_factor {extrapolation}. transformers' YaRN has 1."
        )
    for name in ("beta_fast", "beta_slow"):
        if (value := file.own(f"rope.scaling.yarn_{name}")) is not None:
            yarn[name] = decimal(value)
    own = file.own("rope.scaling.yarn_attn_factor")
    if own is not None or attention != 1.0:  # the latter multiplies YaRN's own factor
        default = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        yarn["attention_factor"] = (default if own is None else decimal(own)) * attention
    return yarn


def _read_factors(
    file: GgufFile, names: frozenset[str] | set[str], kind: str, factor: float, original: int, attention: float,
    rotary_dim: int, rope: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Scaling that is stored as a tensor."""
    if names == {ROPE_FREQS} and kind in ("none", "linear") and factor == attention == 1.0:
        return fit_llama3(file.read(ROPE_FREQS), rope["rope_theta"], rotary_dim, str(file.path))
    if names == {ROPE_LONG, ROPE_SHORT} and kind in ("longrope", "linear") and factor == 1.0:
        return {
            "rope_type": "longrope",
            "long_factor": [decimal(value) for value in file.read(ROPE_LONG).tolist()],
            "short_factor": [decimal(value) for value in file.read(ROPE_SHORT).tolist()],
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    raise UnsupportedModelError(
        f"'{file.path}' has the RoPE tensors {', '.join(sorted(names))} together with rope.scaling.type '{kind}', "
        f"factor {factor} and attn_factor {attention}, a combination that transformers does not have."
    )


def llama3_divisors(theta: float, rotary_dim: int, factor: float, low: float, high: float, original: float) -> Tensor:
    """Divisor of each frequency under Llama 3's scaling, ``[rotary_dim / 2]`` in float64 (arXiv 2407.21783)."""
    wavelengths = _wavelengths(theta, rotary_dim)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def fit_llama3(divisors: Tensor, theta: float, rotary_dim: int, where: str) -> dict[str, Any]:
    """Parameters of Llama 3's scaling that yield ``divisors``, which is all of it that a ``.gguf`` stores.

    Scaling the two frequency factors and the original context alike changes nothing, so the lower factor is 1.

    Raises:
        UnsupportedModelError: There are none.
    """
    stored = divisors.double()
    factor = decimal(float(stored.max()))
    if len(stored) == rotary_dim // 2 and torch.allclose(stored, torch.ones_like(stored), rtol=1e-6):
        return {"rope_type": "default"}
    for low, high, original in _candidates(stored, factor, _wavelengths(theta, rotary_dim)):
        if high <= low or len(stored) != rotary_dim // 2:
            continue
        if torch.allclose(llama3_divisors(theta, rotary_dim, factor, low, high, original), stored, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": int(original) if original == int(original) else original,
            }  # fmt: skip
    raise UnsupportedModelError(
        f"'{where}' has {ROPE_FREQS} of {len(stored)} values that are not those of Llama 3's RoPE scaling for "
        f"{rotary_dim} rotated dimensions. Convert the original checkpoint instead."
    )


def _candidates(stored: Tensor, factor: float, wavelengths: Tensor) -> list[tuple[float, float, float]]:
    """Lower and upper frequency factor and original context that may yield ``stored``, the published ones first."""
    found = [PUBLISHED_LLAMA3]
    between = (stored > 1 + 1e-6) & (stored < factor * (1 - 1e-6)) if len(stored) == len(wavelengths) else stored < 0
    if bool(between.any()):
        inverse = 1 / wavelengths[between]
        smooth = (1 / stored[between] - 1 / factor) / (1 - 1 / factor)
        with_four = float(((1 + 3 * smooth) / inverse).mean())  # the original context if the upper factor is 4
        found += [(1.0, 4.0, float(round(with_four))), (1.0, 4.0, with_four)]
        if int(between.sum()) > 1:  # smooth = slope / wavelength - offset
            columns = torch.stack([inverse, -torch.ones_like(inverse)], dim=1)
            slope, offset = torch.linalg.lstsq(columns, smooth[:, None]).solution.flatten().tolist()
            found.append((1.0, 1 + 1 / offset, slope / offset))
    elif len(stored) == len(wavelengths):  # a step from 1 to the factor
        step = math.sqrt(float(wavelengths[stored < factor].max() * wavelengths[stored == stored.max()].min()))
        found.append((1.0, 1 + 1e-6, step))
    return found


def _wavelengths(theta: float, rotary_dim: int) -> Tensor:
    return 2 * math.pi * theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
