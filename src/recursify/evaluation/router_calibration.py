"""Thresholds of expert-choice routers that have each recursion take the part of the tokens it was trained for.

In training a router takes the best ``k`` of a sequence; in inference it judges each token by itself, and its load is
what comes of that. A threshold per depth, chosen on text, brings the load to a target.
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
    """Set ``config.router_thresholds`` so that over ``sequences`` the loads are ``capacities``, as near as whole tokens
    allow.

    Depth after depth, since a threshold changes what the next recursion sees: ``R`` passes over the text.

    Args:
        model: With expert-choice routers, in eval mode.
        sequences: Token ids ``[B, T]``, without padding.
        capacities: By depth; None takes the model's.

    Returns:
        The thresholds, by depth.

    Raises:
        SettingsError: The model has no expert-choice routers, or there is no text.
    """
    config = model.config
    if config.router != "expert_choice":
        raise SettingsError(
            f"Thresholds are for expert_choice routers, and the model's router is {config.router or 'none'}. Train "
            f"some: recursify uptrain --stage routers."
        )
    texts = list(sequences)
    if not texts or model.training:
        raise SettingsError(
            "Thresholds need some text, and a model in eval mode. Give sequences and call model.eval()."
        )
    wanted = capacities or capacities_of(config)
    thresholds = [0.0] * config.num_recursions
    for depth, capacity in enumerate(wanted):
        if capacity == 1:
            continue
        config.router_thresholds = list(thresholds)
        scores, tokens = [], 0
        for ids in texts:
            # Inside the model's forward: where it is sharded, the weights are together there.
            routing = model(ids.to(model.device), use_cache=False, objective=lambda _, outputs: outputs.routing)
            scores.append(_deciding(routing, depth)[routing.candidates[depth]].sigmoid())
            tokens += ids.numel()
        thresholds[depth] = _threshold_for(torch.cat(scores), tokens_of(capacity, tokens))
    config.router_thresholds = thresholds
    return thresholds


def _deciding(routing: Routing, depth: int) -> Tensor:
    return (routing.deciding or routing.logits)[depth]


def _threshold_for(scores: Tensor, count: int) -> float:
    """Between the ``count``-th best score and the next."""
    ranked = scores.double().sort(descending=True).values
    if count >= len(ranked):
        return 0.0
    return float((ranked[count - 1] + ranked[count]) / 2)
