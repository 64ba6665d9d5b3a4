"""Relaxation: LoRA factors of the residual between each depth's dense weight and the shared weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recursify.checkpoint.dense_names import Factors
from recursify.errors import PlanError

from .low_rank import truncated_svd


@dataclass(frozen=True)
class Relaxation:
    """Relaxation strategy.

    Attributes:
        name: Value of ``--relaxation``.
        factors: Function from a residual ``W_ℓ − W [O, I]`` (float32), a rank and a generator to factors. None if
            the calibration fits them.
        needs_text: True if it needs activations of the dense model on a text.
        reference: Publication or page that describes it.
    """

    name: str
    factors: Callable[[Tensor, int, torch.Generator], Factors] | None
    needs_text: bool = False
    reference: str = "Relaxed Recursive Transformers, arXiv 2410.20672, section 2.3"


def _svd(residual: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Truncated SVD, the nearest factors in Frobenius norm."""
    return truncated_svd(residual, rank)


def _zero(residual: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """LoRA's usual initialization: A as in ``nn.Linear`` (Kaiming uniform with a = √5), B zero."""
    rows, columns = residual.shape
    bound = columns**-0.5
    return torch.zeros(rows, rank), torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


RELAXATIONS = {
    entry.name: entry
    for entry in (
        Relaxation("svd", _svd),
        Relaxation("zero", _zero),
        Relaxation("calibrated", None, needs_text=True, reference="recursify, docs/calibration.md"),
    )
}


def find_relaxation(name: str) -> Relaxation:
    """Relaxation called ``name``; a PlanError if there is none."""
    if name not in RELAXATIONS:
        raise PlanError(f"Unknown relaxation '{name}'. Use one of: auto, {', '.join(RELAXATIONS)}.")
    return RELAXATIONS[name]
