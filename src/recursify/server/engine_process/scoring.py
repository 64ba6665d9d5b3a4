"""Log-probabilities of a prompt's own tokens, which evaluations of given texts ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recursify.engine.engine import Engine
from recursify.engine.sampler import log_probabilities

ROWS = 256
"""Number of positions whose logits are computed at once; those of an entire prompt would take gigabytes."""


@torch.inference_mode()
def score_prompt(engine: Engine, ids: Sequence[int], count: int) -> list[dict[int, float] | None]:
    """Compute the log-probability of each token of ``ids``, and of the ``count`` likeliest tokens in its place.

    The model runs all recursions on the prompt alone, outside the engine's batch. Each mapping begins with the
    likeliest token; the first entry is None, because nothing predicts the first token.
    """
    tokens = torch.tensor([[*ids]], device=engine.decoder.device)
    states = engine.model.base_model(tokens, use_cache=False).last_hidden_state[0]
    rows: list[dict[int, float] | None] = [None]
    for start in range(0, len(ids) - 1, ROWS):
        targets = tokens[0, start + 1 : start + 1 + ROWS]
        logits = engine.decoder.compute_logits(states[start : start + len(targets)])
        rows += log_probabilities(logits, targets, [count] * len(targets))
    return rows
