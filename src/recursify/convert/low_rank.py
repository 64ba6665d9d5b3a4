"""Low-rank approximation in a weighted norm, used by relaxation and calibrated initialization.

Shapes: O/I output/input features of a linear map, r rank, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

RIDGE = 1e-3
"""Ridge added to second moments of unit mean diagonal, so that directions absent from the text keep a small weight."""

EXACT_SVD_LIMIT = 1024
"""Smaller side of a matrix above which low ranks are computed by randomized SVD. On 2048 x 5632 at rank 64, LAPACK
takes 36 CPU seconds and the randomized SVD 1.7, for a residual 0.2 % larger in norm."""


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of rank ``rank`` of ``matrix [O, I]`` in Frobenius norm, in its dtype (float32 or better).

    Returns:
        ``B = U Σ [O, r]`` and ``A = Vᵀ [r, I]``. Source: RRT (arXiv 2410.20672) section 2.3, LoRA scale 1.
    """
    smaller = min(matrix.shape)
    if rank >= smaller:
        return full_rank_factors(matrix)
    if smaller > EXACT_SVD_LIMIT and rank < smaller // 8:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=rank + 16, niter=6)
        right = right.mT
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank].contiguous()


def full_rank_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Exact factors ``B A = matrix [O, I]``: the matrix itself and an identity.

    The product of SVD factors is only accurate to 1e-6, which over 30 layers is 3e-4 on SmolLM2's logits.
    """
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (matrix, identity) if matrix.shape[1] <= matrix.shape[0] else (identity, matrix)


class WeightedNorm:
    """Norm ``‖E‖² = tr(E C Eᵀ)`` of an error ``E [O, I]`` of a linear map whose inputs have second moment ``C``.

    Args:
        moment: ``C = Σ x xᵀ``, ``[I, I]``, any scale, float32 or better. It is scaled to unit mean diagonal, so that
            tied layers count equally whatever the scale of their inputs, and given a ridge of ``RIDGE``.
    """

    def __init__(self, moment: Tensor):
        self.scale = float(moment.diagonal().double().mean().clamp_min(1e-30))
        self.moment = moment.double() / self.scale
        """Scaled ``C`` plus the ridge, ``[I, I]``, float64."""
        self.moment.diagonal().add_(RIDGE)

    @classmethod
    def total(cls, norms: Sequence[WeightedNorm]) -> Self:
        """Sum of norms, as they are scaled."""
        norm = cls.__new__(cls)
        norm.scale, norm.moment = 1.0, sum((each.moment for each in norms[1:]), norms[0].moment)
        return norm

    @cached_property
    def factor(self) -> Tensor:
        """Lower triangular ``S [I, I]`` with ``C = S Sᵀ``, float64."""
        return torch.linalg.cholesky(self.moment)

    def error(self, difference: Tensor) -> float:
        """Squared output error ``tr(E C Eᵀ)`` of ``E [O, I]``."""
        difference = difference.double()
        return float(((difference @ self.moment) * difference).sum())

    def low_rank(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factors ``B = U Σ [O, r]``, ``A = Vᵀ S⁻¹ [r, I]`` nearest to ``matrix M``, where ``M S = U Σ Vᵀ``.

        ``U`` are eigenvectors of ``M C Mᵀ``, and ``A = Σ⁻¹ Uᵀ M``, so that ``S`` is needed only where ``O > I``.
        """
        matrix = matrix.double()
        if rank >= min(matrix.shape):
            return full_rank_factors(matrix)
        squares, vectors = _leading_eigenvectors(self._gram(matrix), rank)
        if matrix.shape[0] > matrix.shape[1]:
            right = torch.linalg.solve_triangular(self.factor.mT, vectors, upper=True)
            return matrix @ (self.factor @ vectors), right.mT
        lengths = squares.clamp_min(1e-14 * squares[0] + 1e-60).sqrt()
        return vectors * lengths, (vectors.mT @ matrix) / lengths[:, None]

    def squared_singular_values(self, matrix: Tensor) -> Tensor:
        """Squared singular values of ``matrix S``, descending: the error that each further rank removes."""
        return torch.linalg.eigvalsh(self._gram(matrix.double())).flip(0).clamp_min(0)

    def _gram(self, matrix: Tensor) -> Tensor:
        """Smaller Gram matrix of ``M S``: ``M C Mᵀ [O, O]``, or ``Sᵀ Mᵀ M S [I, I]`` where ``O > I``."""
        if matrix.shape[0] <= matrix.shape[1]:
            return matrix @ self.moment @ matrix.mT
        whitened = matrix @ self.factor
        return whitened.mT @ whitened


class TiedNorms(list[WeightedNorm]):
    """Norms of the inputs of tied maps, by depth. The maps of a stage share them, and so the factor of their sum."""

    @cached_property
    def total(self) -> WeightedNorm:
        """Sum of the norms."""
        return WeightedNorm.total(self)


SINGLE_THREAD_LIMIT = 2048
"""Size up to which eigenproblems run on one thread. At 576 a second thread gains nothing, and on a busy machine its
spinning costs a factor of 30 (0.046 s against 1.5 s, 2 cores, another process on one of them)."""


def _leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Largest ``rank`` eigenvalues of a symmetric matrix ``[N, N]``, descending, and their vectors ``[N, rank]``.

    On Gram matrices it takes half the time of LAPACK's SVD at 576 x 1536, and its float64 error is below float32
    resolution.
    """
    threads = torch.get_num_threads()
    if len(gram) <= SINGLE_THREAD_LIMIT:
        torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(gram)
    finally:
        torch.set_num_threads(threads)
    return values[-rank:].flip(0), vectors[:, -rank:].flip(1)


def regress(weight: Tensor, cross: Tensor, norm: WeightedNorm, offset: Tensor | None = None) -> Tensor:
    """Map ``M`` that reproduces on inputs ``x`` the outputs of ``W`` on inputs ``y``: ``min_M Σ ‖W y + e − M x‖²``.

    Args:
        weight: Dense weight ``W [O, I]``.
        cross: ``Σ y xᵀ``, ``[I, I]``.
        norm: Norm of ``Σ x xᵀ``; its ridge draws ``M`` towards ``W``.
        offset: ``Σ e xᵀ``, ``[O, I]``, for an additional target ``e``.

    Returns:
        ``M [O, I]``, float64.
    """
    scaled = cross.double() / norm.scale
    scaled.diagonal().add_(RIDGE)
    target = weight.double() @ scaled
    if offset is not None:
        target += offset.double() / norm.scale
    return torch.cholesky_solve(target.mT, norm.factor).mT


def share(weights: list[Tensor], norms: TiedNorms) -> Tensor:
    """Map nearest to all ``weights [O, I]`` in their norms: ``(Σ W_ℓ C_ℓ)(Σ C_ℓ)⁻¹``, float64."""
    weighted = torch.zeros((), dtype=torch.float64)
    for weight, norm in zip(weights, norms, strict=True):
        weighted = weighted + weight.double() @ norm.moment
    return torch.cholesky_solve(weighted.mT, norms.total.factor).mT


def share_for_residuals(weights: list[Tensor], norms: TiedNorms, rank: int, *, num_sweeps: int | None = None) -> Tensor:
    """Shared map ``W`` of ``min Σ_ℓ ‖W_ℓ − W − B_ℓ A_ℓ‖²``, solved jointly with the residuals.

    Averaging first and truncating the residuals afterwards is a saddle point of this problem: with two layers the
    residuals are ``±(W_0 − W_1)/2``, which spend their ranks on the *same* directions. Alternating the leading
    directions of the difference between the two residuals, and refitting ``W``, covers twice as many. Sweeps of
    alternating minimization follow.

    Args:
        weights: Dense weights by depth, each ``[O, I]``.
        norms: Input norms by depth.
        rank: Rank of each residual; 0 gives :func:`share`.
        num_sweeps: Number of sweeps; none of them raises the error. The default is 1 for two layers, whose start is
            close to the optimum (on SmolLM2-135M the first sweep reduces the error by 2 %, the second by 0.6 %), and 4
            for more layers, which start from the mean.

    Returns:
        ``W [O, I]``, float64; the residuals are :meth:`WeightedNorm.low_rank` of ``W_ℓ − W``.
    """
    shared = share(weights, norms)
    if rank == 0 or len(weights) == 1:
        return shared

    def refit() -> Tensor:
        return share([weight - residual for weight, residual in zip(weights, residuals, strict=True)], norms)

    num_sweeps = num_sweeps or (1 if len(weights) == 2 else 4)
    residuals = [torch.zeros_like(shared) for _ in weights]
    if len(weights) == 2:
        left, right = norms.total.low_rank(weights[0].double() - weights[1].double(), min(2 * rank, *shared.shape))
        residuals = [left[:, 0::2] @ right[0::2], -(left[:, 1::2] @ right[1::2])]
        shared = refit()
    for _ in range(num_sweeps):
        for index, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
            left, right = norm.low_rank(weight.double() - shared, rank)
            residuals[index] = left @ right
            shared = refit()
    return shared
