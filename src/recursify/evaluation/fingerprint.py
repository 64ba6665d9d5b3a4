"""What a model said when it was made, in numbers that another machine can check.

A fingerprint is the log-probability of the first choice after each of a few fixed tokens, with all recursions, in
float32 on a CPU: small enough for ``recursify.json``, and another as soon as a weight on that way, or the code, is
another. It says nothing of exit heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

NUM_TOKENS = 32
TOLERANCE = 1e-3
"""Nats. In float32, matrix products of other sizes or threads move a log-probability by 1e-5 to 1e-4."""


@dataclass(frozen=True)
class Fingerprint:
    """What a model says to fixed tokens.

    Attributes:
        ids: Token ids ``[NUM_TOKENS]`` that it read.
        choices: After each of them, the id that it put first.
        log_probabilities: Of those choices, in nats.
    """

    ids: list[int]
    choices: list[int]
    log_probabilities: list[float]

    def to_dict(self) -> dict[str, Any]:
        """As ``recursify.json`` has it."""
        return asdict(self)


@torch.inference_mode()
def take_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """Read fixed random tokens with a recursive ``model``, which has to be in float32 on the CPU."""
    ids = torch.randint(0, model.config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, num_recursions=model.config.num_recursions, use_cache=False).logits
    best = logits.float().log_softmax(-1).max(-1)
    return Fingerprint(ids[0].tolist(), best.indices[0].tolist(), best.values[0].tolist())


def largest_difference(recorded: Fingerprint, found: list[float]) -> float:
    """How far log-probabilities of the recorded choices are from the recorded ones, at most; infinite if one is NaN."""
    difference = (torch.tensor(recorded.log_probabilities) - torch.tensor(found)).abs().max()
    return float("inf") if torch.isnan(difference) else float(difference)
