"""Log-probabilities of a prompt's own tokens, which evaluations of other people's texts ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recursify.engine.engine import Engine
from recursify.engine.sampler import log_probabilities

ROWS = 256
"""Positions that are read out at once: logits of a whole prompt would be gigabytes."""


@torch.inference_mode()
def score_prompt(engine: Engine, ids: Sequence[int], count: int) -> list[dict[int, float] | None]:
    """Per token of ``ids``, its log-probability and those of the ``count`` first choices in its place, best first.

    The model runs whole and by itself, beside the engine's batch. None for the first token.
    """
    tokens = torch.tensor([[*ids]], device=engine.decoder.device)
    states = engine.model.base_model(tokens, use_cache=False).last_hidden_state[0]
    rows: list[dict[int, float] | None] = [None]
    for start in range(0, len(ids) - 1, ROWS):
        targets = tokens[0, start + 1 : start + 1 + ROWS]
        logits = engine.decoder.compute_logits(states[start : start + len(targets)])
        rows += log_probabilities(logits, targets, [count] * len(targets))
    return rows
