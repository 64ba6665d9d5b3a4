"""Values of a model's ``generation_config.json``: tokens that end a text, and defaults of sampling."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Ge, Gt
from pydantic import AllowInfNan, PositiveInt
from transformers import GenerationConfig

from recursify.errors import CheckpointError
from recursify.settings import Fraction, PositiveFraction, Settings

logger = logging.getLogger(__name__)

FILE = "generation_config.json"

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields that are defaults of sampling, with the names of :class:`~recursify.engine.SamplingParams`."""

NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}
"""Mapping from fields that change the output of transformers' ``generate``, and are not applied here, to their values
without an effect, besides None."""


def read_generation_config(folder: Path) -> GenerationConfig:
    """Generation config of a model's folder, where transformers looks for it: in a file of its own, or in its config.

    Raises:
        CheckpointError: It is damaged, or a field that is used has a wrong type or value.
    """
    file = folder / FILE if (folder / FILE).exists() else folder / "config.json"
    is_own = file.name == FILE
    try:
        if not isinstance(fields := json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError(f"it holds a {type(fields).__name__}, not an object.")
        config = GenerationConfig.from_pretrained(folder, config_file_name=file.name, _from_model_config=not is_own)
        GenerationDefaults.from_mapping(_defaults(config), file.name)
        _check_types(config)
    except (OSError, ValueError, TypeError, CheckpointError) as error:
        raise CheckpointError(
            f"'{file}' does not load: {' '.join(str(error).split())} Correct or remove it."
        ) from error
    return config


def _check_types(config: GenerationConfig) -> None:
    """Raise a ValueError for types that transformers' ``generate`` fails on."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        tokens = value if isinstance(value, list) and name == "eos_token_id" else [] if value is None else [value]
        if not all(type(token) is int for token in tokens):
            raise ValueError(f"{name} must be a token id, got {value!r}.")
    for name, value in _defaults(config).items():
        if isinstance(value, str):
            raise ValueError(f"{name} must not be text, got {value!r}.")


def _defaults(config: GenerationConfig) -> dict[str, Any]:
    """Fields of :class:`GenerationDefaults` that ``config`` has."""
    given = {name: getattr(config, name, None) for name in GenerationDefaults.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(top_k := given.get("top_k"), int):
        given["top_k"] = max(top_k, 0)  # some write -1 for all tokens
    return given


def eos_tokens(model: Any) -> frozenset[int]:
    """Tokens that end a text: those of the config and those of the generation config."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        found |= set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return frozenset(found)


class GenerationDefaults(Settings, error=CheckpointError):
    """Defaults of a model; a field is None where the model has none.

    Raises:
        CheckpointError: A value is out of its range.
    """

    do_sample: bool | None = None
    """Sample, rather than take the likeliest token."""
    temperature: Annotated[float, Ge(0), AllowInfNan(False)] | None = None
    """Sampling temperature."""
    top_k: Annotated[int, Ge(0)] | None = None
    """Number of most likely tokens to sample from; 0 keeps all."""
    top_p: PositiveFraction | None = None
    """Probability mass of the most likely tokens to sample from."""
    min_p: Fraction | None = None
    """Least probability of a token to sample, relative to that of the most likely one."""
    repetition_penalty: Annotated[float, Gt(0), AllowInfNan(False)] | None = None
    """Penalty of tokens in the prompt or the output."""
    max_new_tokens: PositiveInt | None = None
    """Maximum number of new tokens."""

    @classmethod
    def of(cls, model: Any) -> Self:
        """Read the generation config of a loaded model, and warn of fields that change its output elsewhere."""
        config = getattr(model, "generation_config", None) or GenerationConfig()
        others = {name: getattr(config, name, None) for name in NOT_APPLIED}
        others = {name: value for name, value in others.items() if value is not None and value not in NOT_APPLIED[name]}
        if others:
            logger.warning(
                "%s sets %s, which Recursify does not apply.",
                FILE,
                ", ".join(f"{name}={value!r}" for name, value in others.items()),
            )
        return cls.from_mapping(_defaults(config), FILE)

    def sampling(self, given: Mapping[str, Any], *, samples: bool = False) -> dict[str, Any]:
        """Values of :data:`SAMPLING`: those ``given`` that are not None, else the model's, else ones without an effect.

        Args:
            given: Values that a user gave.
            samples: Flag to sample if neither a temperature nor the model's ``do_sample`` decides that.
        """
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        own = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if not (samples if self.do_sample is None else self.do_sample):
            own["temperature"] = 0.0
        return neutral | own | {name: given[name] for name in SAMPLING if given.get(name) is not None}
