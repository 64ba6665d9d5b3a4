"""Thresholds of expert-choice routers, so that each recursion processes the fraction of tokens it was trained for.

In training a router selects the top ``k`` tokens of a sequence; at inference it decides token by token, so its load
varies. A threshold per depth, chosen on text, brings the load to the capacity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from recursify.errors import SettingsError
from recursify.modeling import RecursiveForCausalLM, Routing
from recursify.modeling.recursive_routing import capacities_of, tokens_of


@torch.no_grad()
def calibrate_thresholds(
    model: RecursiveForCausalLM, sequences: Iterable[Tensor], capacities: list[float] | None = None
) -> list[float]:
    """Set ``config.router_thresholds`` so that the loads over ``sequences`` equal ``capacities``, up to whole tokens.

    A threshold changes the input of the next recursion, so this takes one pass over the text per recursion.

    Args:
        model: Model with expert-choice routers, in eval mode.
        sequences: Batches of token ids ``[B, T]`` without padding.
        capacities: Fraction of tokens per depth; None takes the model's.

    Returns:
        One threshold per depth.

    Raises:
        SettingsError: The model has no expert-choice routers or is in training mode, or there is no text.
    """
    config = model.config
    if config.router != "expert_choice":
        raise SettingsError(
            f"Thresholds need expert_choice routers, and the model's router is {config.router or 'none'}. Train "
            f"routers: recursify uptrain --stage routers."
        )
    batches = list(sequences)
    if not batches or model.training:
        raise SettingsError("Thresholds need text and a model in eval mode. Pass sequences, and call model.eval().")
    targets = capacities or capacities_of(config)
    thresholds = [0.0] * config.num_recursions
    for depth, capacity in enumerate(targets):
        if capacity == 1:
            continue
        config.router_thresholds = list(thresholds)
        scores, tokens = [], 0
        for ids in batches:
            # Inside the model's forward, where the weights of a sharded model are gathered.
            routing = model(ids.to(model.device), use_cache=False, objective=lambda _, outputs: outputs.routing)
            scores.append(_deciding(routing, depth)[routing.candidates[depth]].sigmoid())
            tokens += ids.numel()
        thresholds[depth] = _threshold_for(torch.cat(scores), tokens_of(capacity, tokens))
    config.router_thresholds = thresholds
    return thresholds


def _deciding(routing: Routing, depth: int) -> Tensor:
    return (routing.deciding or routing.logits)[depth]


def _threshold_for(scores: Tensor, count: int) -> float:
    """Midpoint between the ``count``-th highest score and the next."""
    ranked = scores.double().sort(descending=True).values
    if count >= len(ranked):
        return 0.0
    return float((ranked[count - 1] + ranked[count]) / 2)
