"""How the per-depth residuals come to be: LoRA factors of what the shared weight misses at each depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recursify.errors import PlanError

from .low_rank import truncated_svd

Factors = tuple[Tensor, Tensor]
"""``(B [O, r], A [r, I])``."""


@dataclass(frozen=True)
class Relaxation:
    """A way to make residuals.

    Attributes:
        name: What the user types.
        factors: Residual ``W_ℓ − W [O, I]`` in float32, rank, generator -> factors. None where text is needed: the
            calibration makes them.
        needs_text: Statistics of activations are needed.
        reference: Where it is from.
    """

    name: str
    factors: Callable[[Tensor, int, torch.Generator], Factors] | None
    needs_text: bool = False
    reference: str = "Relaxed Recursive Transformers, arXiv 2410.20672, section 2.3"


def _svd(residual: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Truncated SVD: the nearest in Frobenius norm."""
    return truncated_svd(residual, rank)


def _zero(residual: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """LoRA's usual start: A as ``nn.Linear`` draws it (Kaiming uniform with a = √5), B zero."""
    rows, columns = residual.shape
    bound = 1 / math.sqrt(columns)
    drawn = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return torch.zeros(rows, rank), drawn


RELAXATIONS = {
    entry.name: entry
    for entry in (
        Relaxation("svd", _svd),
        Relaxation("zero", _zero),
        Relaxation("calibrated", None, needs_text=True, reference="recursify, docs/calibration.md"),
    )
}


def find_relaxation(name: str) -> Relaxation:
    """The strategy ``name``.

    Raises:
        PlanError: There is none; the message lists those that exist.
    """
    if name not in RELAXATIONS:
        raise PlanError(f"Unknown relaxation '{name}'. Use one of: auto, {', '.join(RELAXATIONS)}.")
    return RELAXATIONS[name]
