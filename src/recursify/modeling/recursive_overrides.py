"""Fields of the configuration that a caller gives to ``from_pretrained``: for one run, and never written.

A field that decides what the weights mean is refused there: transformers would load them all the same, and compute
something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OVERRIDABLE = (
    "exit_depth",
    "exit_kv",
    "exit_policy",
    "exit_thresholds",
    "exit_through_coda",
    "exit_vocabulary",
    "residual_scale",
    "router_thresholds",
)
"""Fields of ours that ``from_pretrained`` takes."""


def refuse_other_models(given: Mapping[str, Any], stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse fields ``given`` to ``from_pretrained`` that make another model of the ``stored`` one.

    Raises:
        ValueError: A field of ours that is not in :data:`OVERRIDABLE`, or the number of layers, with another value.
    """
    for name in (*defaults, "num_hidden_layers"):
        own = stored.get(name, defaults.get(name))
        if name in given and name not in OVERRIDABLE and given[name] != own:
            raise ValueError(
                f"{name}={given[name]!r} cannot be given to from_pretrained: the weights were made for {own!r}. Leave "
                f"it out, and convert again for another. Of a recursive model's own fields from_pretrained takes "
                f"{', '.join(OVERRIDABLE)}; model.with_recursions changes the number of recursions."
            )
