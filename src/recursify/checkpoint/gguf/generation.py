"""Generation config of a ``.gguf``: tokens that end a text, and the author's sampling."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .file import GgufFile
from .rope import decimal
from .vocabulary import special_id, special_ids

SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Fields of a generation config, and the keys under ``general.sampling`` that llama.cpp copies them to."""


def read_generation_config(file: GgufFile) -> GenerationConfig:
    """Generation config that the model's author gave, as far as the file has it.

    That it samples is not said; it does if there is a temperature or a selection of tokens.
    """
    ids: dict[str, Any] = special_ids(file)
    ends = [special_id(file, f"{name}_token_id") for name in ("eos", "eot", "eom")]  # of a text, a turn, a message
    ends = list(dict.fromkeys(number for number in ends if number is not None))
    if len(ends) > 1:
        ids["eos_token_id"] = ends
    stated = {field: file.get(f"general.sampling.{key}") for field, key in SAMPLING.items()}
    sampling = {
        field: value if isinstance(value, int) else decimal(value)
        for field, value in stated.items()
        if value is not None
    }
    penalty = {field: sampling.pop(field) for field in ("repetition_penalty",) if field in sampling}
    if sampling and sampling.get("temperature") != 0:
        ids |= {**sampling, "do_sample": True}
    return GenerationConfig(**ids, **penalty)
