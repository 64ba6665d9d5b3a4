"""Generation configs that transformers writes: it refuses one with fields that its ``generate`` ignores."""

from __future__ import annotations

import copy
import functools
import logging

from transformers import GenerationConfig

logger = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
"""Fields that are ignored unless ``do_sample`` is set."""

BEAMS = ("early_stopping", "length_penalty")
"""Fields that are ignored with one beam."""

CACHES = ("cache_implementation", "cache_config")
"""Fields that are ignored without a KV cache."""


def savable(config: GenerationConfig) -> GenerationConfig:
    """``config`` itself if transformers writes it, else a copy without the fields that its ``generate`` ignores.

    Raises:
        ValueError: transformers does not write it for another reason.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        kept = copy.deepcopy(config)
    else:
        return config
    ignored: list[str] = [] if config.do_sample else [*SAMPLING]
    ignored += BEAMS if config.num_beams in (None, 1) else ()
    ignored += CACHES if config.use_cache is False else ()
    ignored += () if config.return_dict_in_generate else config.extra_output_flags
    if config.pad_token_id is not None and config.pad_token_id < 0:
        ignored.append("pad_token_id")
    dropped = {name: getattr(config, name, None) for name in ignored}
    for name in dropped:
        setattr(kept, name, None)
    kept.validate(strict=True)
    _warn_once(", ".join(f"{name}={value!r}" for name, value in dropped.items() if value is not None))
    return kept


@functools.cache
def _warn_once(fields: str) -> None:
    logger.warning(
        "The model is saved without %s of its generation config: transformers' generate ignores them as the others are "
        "set, and refuses to write them. To sample, set do_sample=True.",
        fields,
    )
