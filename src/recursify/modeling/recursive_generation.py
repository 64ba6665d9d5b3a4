"""Inputs of ``generate`` as the dense family prepares them, and the one KV cache that is meant where two are given.

Shape legend: B batch, T tokens.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationMixin

from .recursive_layers import CACHE_ARGUMENT


def prepares_inputs(family: Any) -> bool:
    """True if a dense ``family``'s model class prepares the inputs of ``generate`` in a way of its own.

    Phi-3's drops the KV cache where the sequence grows into other RoPE factors, so that all keys have the new ones.
    """
    return family.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation


@functools.cache
def _borrowed(family: Any) -> Any:
    """A class with the methods of ``family`` on a model of another class."""
    return type(family.__name__, (family,), {"__getattr__": lambda self, name: getattr(self.__dict__["model"], name)})


def prepare_as(family: Any, model: Any, input_ids: Tensor, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
    """Inputs of the next forward of ``model``, as ``family``'s class prepares them given ``input_ids [B, T]``."""
    borrowed = _borrowed(family)
    methods = borrowed.__new__(borrowed)
    methods.__dict__["model"] = model
    return methods.prepare_inputs_for_generation(input_ids, *arguments, **kwargs)


def choose_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The KV cache of a forward that may have got one by each name: of two, the one that holds something.

    Tools made for transformers before 5.24 (peft's prefix tuning) pass a filled ``past_key_values`` while ``generate``
    passes a new ``cache``.

    Raises:
        ValueError: Two caches, both or neither of which hold something.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    lengths = [int(entry.get_seq_length()) for entry in (past_key_values, cache)]
    if all(lengths) or not any(lengths):
        raise ValueError(
            f"There are two KV caches: past_key_values with {lengths[0]} tokens and cache with {lengths[1]}. Pass one "
            f"of them; both names mean the same."
        )
    return past_key_values if lengths[0] else cache


def one_cache_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` with the KV cache under the name that the installed transformers knows.

    Raises:
        ValueError: Two caches that hold something, or two that do not.
    """
    caches = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
    chosen = choose_cache(*caches)
    return kwargs if chosen is None else {**kwargs, CACHE_ARGUMENT: chosen}
