"""Shared weight of tied linear maps, alone or solved jointly with low-rank residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .low_rank import Factors
from .weighted_norm import TiedNorms


def share(weights: list[Tensor], norms: TiedNorms) -> Tensor:
    """Map nearest to all ``weights [O, I]`` in their norms: ``(Σ W_ℓ C_ℓ)(Σ C_ℓ)⁻¹``, float64."""
    pairs = zip(weights, norms, strict=True)
    return norms.total.over(sum((norm.times(weight) for weight, norm in pairs), torch.zeros(())))


def share_for_residuals(weights: list[Tensor], norms: TiedNorms, rank: int, *, num_sweeps: int = 4) -> Tensor:
    """Shared map ``W`` of ``min Σ_ℓ ‖W_ℓ − W − B_ℓ A_ℓ‖²``, solved jointly with the residuals.

    Averaging first and truncating the residuals afterwards is a saddle point of this problem: with two layers the
    residuals are ``±(W_0 − W_1)/2``, which spend their ranks on the *same* directions. Two layers have a closed form
    that covers twice as many: the best approximation of ``W_0 − W_1`` of rank ``2r`` in :class:`DifferenceNorm`,
    dealt out to the residuals in any way, and the ``W`` that is best for them. More layers start from the mean and
    alternate between residuals and ``W``.

    Args:
        weights: Dense weights by depth, each ``[O, I]``.
        norms: Input norms by depth.
        rank: Rank of each residual; 0 gives :func:`share`.
        num_sweeps: Number of sweeps over more than two layers; none of them raises the error.

    Returns:
        ``W [O, I]``, float64; the residuals are :meth:`WeightedNorm.low_rank` of ``W_ℓ − W``.
    """
    mean = share(weights, norms)
    if rank == 0 or len(weights) == 1:
        return mean
    if len(weights) == 2:
        b, a = norms.difference.low_rank(weights[0] - weights[1], min(2 * rank, *mean.shape))
        return _without(mean, [(b[:, 0::2], a[0::2]), (-b[:, 1::2], a[1::2])], norms)
    residuals: list[Factors | None] = [None] * len(weights)
    shared = mean
    for _ in range(num_sweeps):
        for index, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
            residuals[index] = norm.low_rank(weight.double() - shared, rank)
            shared = _without(mean, residuals, norms)
    return shared


def _without(mean: Tensor, residuals: Sequence[Factors | None], norms: TiedNorms) -> Tensor:
    """Map nearest to all weights less their residuals: ``mean − Σ B_ℓ (A_ℓ C_ℓ)(Σ C_ℓ)⁻¹``, a solve of few rows."""
    pairs = [(factors, norm) for factors, norm in zip(residuals, norms, strict=True) if factors is not None]
    left = torch.cat([b.double() for (b, _), _ in pairs], dim=1)
    right = torch.cat([norm.times(a) for (_, a), norm in pairs])
    return mean - left @ norms.total.over(right)
