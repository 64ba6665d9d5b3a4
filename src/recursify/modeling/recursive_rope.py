"""RoPE whose frequencies depend on the length of the sequence (``dynamic``, ``longrope``): one module per length.

transformers' modules take the length from the largest position of a call, and some keep the last one. That is right for
a whole sequence, and not for a call with tokens of several sequences, or with a part of one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def length_limits(rotary: Any) -> list[tuple[str, int]]:
    """Types of RoPE in ``rotary`` that depend on the length, with the longest length that changes nothing."""
    types, parameters = getattr(rotary, "rope_type", "default"), getattr(rotary.config, "rope_parameters", None) or {}
    by_kind = types.items() if isinstance(types, dict) else [(None, types)]
    limits = []
    for kind, name in by_kind:
        if name == "longrope":
            own = parameters if kind is None else parameters[kind]
            limits.append((name, int(own["original_max_position_embeddings"])))
        elif "dynamic" in name:
            limits.append((name, int(rotary.original_max_seq_len)))
    return limits


def rope_key(rotary: Any, length: int) -> tuple[int, ...]:
    """Key of the frequencies at ``length``: two lengths with the same key have the same ones."""
    return tuple(
        int(length > limit) if name == "longrope" else max(length, limit) for name, limit in length_limits(rotary)
    )


@torch.no_grad()
def at_length(rotary: Any, length: int) -> nn.Module:
    """A copy of ``rotary`` with the frequencies of ``length`` tokens, whatever it is called with."""
    fixed: Any = copy.deepcopy(rotary, {id(rotary.config): rotary.config})
    types = fixed.rope_type
    kinds = [{"layer_type": kind} for kind in types] if isinstance(types, dict) else [{}]
    states = torch.zeros(1, 1, 1, device=next(fixed.buffers()).device)
    for largest in (0, length - 1):  # the first call undoes what longer sequences before left
        for kind in kinds:
            fixed(states, torch.tensor([[largest]], device=states.device), **kind)
    fixed.rope_type = dict.fromkeys(types, "default") if isinstance(types, dict) else "default"
    return fixed


def fixed_rope(rotary: Any, prompt_length: int, max_length: int) -> nn.Module:
    """``rotary`` for one text of ``prompt_length`` tokens that grows to ``max_length``, at lengths that change nothing.

    Raises:
        ValueError: The frequencies change on the way.
    """
    limits = length_limits(rotary)
    if not limits:
        return rotary
    if rope_key(rotary, prompt_length) != rope_key(rotary, max_length):
        name, limit = limits[0]
        raise ValueError(
            f"The model's RoPE ({name}) has other frequencies beyond {limit} tokens, and a text that grows from "
            f"{prompt_length} to {max_length} tokens gets there: neither an exit policy nor speculation follows it. "
            f"Limit the text to {limit} tokens (max_new_tokens), or call generate without them."
        )
    return at_length(rotary, prompt_length)
