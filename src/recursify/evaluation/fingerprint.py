"""Fingerprint of a model's predictions, which another machine can verify.

It is the log-probability of the argmax after each of a few fixed tokens, with all recursions, in float32 on a CPU:
small enough for ``recursify.json``, and different as soon as a weight or the modeling code is. It does not cover exit
heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel

NUM_TOKENS = 32
TOLERANCE = 1e-3
"""Tolerance in nats. In float32, other matrix sizes or thread counts move a log-probability by 1e-5 to 1e-4."""


class Fingerprint(TypedDict):
    """Predictions for fixed tokens, as in ``recursify.json``.

    Attributes:
        ids: Input token ids, ``[NUM_TOKENS]``.
        choices: Argmax after each of them.
        log_probabilities: Log-probabilities of ``choices``, in nats.
    """

    ids: list[int]
    choices: list[int]
    log_probabilities: list[float]


@torch.no_grad()
def take_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """Compute the fingerprint of a recursive ``model`` on the CPU, in float32 whatever its dtype."""
    ids = torch.randint(0, model.config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with in_float32(model):
        logits = model(input_ids=ids, num_recursions=model.config.num_recursions, use_cache=False).logits
    best = logits.float().log_softmax(-1).max(-1)
    choices, log_probabilities = best.indices[0].tolist(), best.values[0].tolist()
    return Fingerprint(ids=ids[0].tolist(), choices=choices, log_probabilities=log_probabilities)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Context in which each module with weights of its own is cast to float32 while it runs, and back after that.

    It computes what ``model.float()`` does, with one module in float32 at a time.
    """
    hooks: list[Any] = []
    covered: set[nn.Module] = set()
    for module in model.modules():
        weight = next(module.parameters(recurse=False), None)
        if weight is None or weight.dtype == torch.float32 or module in covered:
            continue
        covered.update(module.modules())
        hooks.append(module.register_forward_pre_hook(lambda module, _: module.float() and None))
        hooks.append(module.register_forward_hook(lambda module, *_, dtype=weight.dtype: module.to(dtype) and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_difference(recorded: Fingerprint, found: list[float]) -> float:
    """Largest difference of recomputed log-probabilities from the recorded ones; infinite if one is NaN."""
    difference = (torch.tensor(recorded["log_probabilities"]) - torch.tensor(found)).abs().max()
    return float("inf") if torch.isnan(difference) else float(difference)
