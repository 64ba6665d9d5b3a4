"""Tiny dense models with every type of RoPE that transformers has."""

from __future__ import annotations

from typing import Any

LIMIT = 24
"""Number of tokens after which the types that depend on the length change."""

ROPE_TYPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 5.0, 9.0, 20.0],
        "factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}

MODELS = [*(("llama", name) for name in ROPE_TYPES), ("phi3", "longrope")]
"""Families and types; Phi-3, which knows ``longrope`` only, drops its cache where that changes."""


def with_rope(family: str, name: str) -> dict[str, Any]:
    """Config fields of a tiny model of ``family`` with RoPE of type ``name``."""
    fields: dict[str, Any] = {
        "rope_parameters": {"rope_type": name, "rope_theta": 100.0, **ROPE_TYPES[name]},
        "max_position_embeddings": LIMIT if name == "dynamic" else 4 * LIMIT,
    }
    if family == "phi3":
        fields["original_max_position_embeddings"] = LIMIT
    return fields
