"""Norms of the errors of a linear map, weighted by the inputs that it receives on a text, and regression on them.

Shapes: O/I output/input features of a linear map, n tokens, r rank, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from .low_rank import Factors, find_factors, full_rank_factors, is_small_rank, leading_eigenvectors, scale_factors

PRIOR_TOKENS = 2048
"""Number of tokens of white input that are added to a text's second moments. Without them shared weights and
regressions learn the calibration text: on SmolLM2-135M after 4,096 tokens, held-out perplexity is 40.5 with a ridge of
1e-3, 25.6 with 0.1 and with 0.5."""

BLOCK = 512
"""Columns per block of a symmetric product."""


class InputNorm(Protocol):
    """Norm ``‖E‖² = tr(E C Eᵀ)`` of an error ``E [O, I]``, with ``C [I, I]`` the second moment of the inputs."""

    def times(self, matrix: Tensor) -> Tensor:
        """``matrix [O, I] @ C``."""

    def low_rank(self, matrix: Tensor, rank: int) -> Factors:
        """Factors ``B [O, r]``, ``A [r, I]`` nearest to ``matrix [O, I]``."""

    def fit(self, errors: Tensor, inputs: Tensor) -> Tensor:
        """Ridge regression ``D [O, I]`` of ``errors [n, O]`` on the norm's own ``inputs [n, I]``."""


def input_norm(inputs: Tensor) -> InputNorm:
    """Norm of ``inputs [n, I]``, in token space where tokens are fewer than input features."""
    is_wide = len(inputs) < inputs.shape[1]
    return TokenNorm(inputs) if is_wide else WeightedNorm(second_moment(inputs), len(inputs))


def second_moment(inputs: Tensor) -> Tensor:
    """``Σ x xᵀ [I, I]`` of the rows of ``inputs [n, I]``, in their dtype: the blocks on and above the diagonal."""
    width = inputs.shape[1]
    moment = inputs.new_empty(width, width)
    for start in range(0, width, BLOCK):
        rows = slice(start, start + BLOCK)
        products = inputs[:, rows].mT @ inputs[:, start:]
        moment[rows, start:] = products
        moment[start:, rows] = products.mT
    return moment


class WeightedNorm:
    """Norm ``‖E‖² = tr(E C Eᵀ)`` of an error ``E [O, I]`` of a linear map whose inputs have second moment ``C``.

    Args:
        moment: ``C = Σ x xᵀ``, ``[I, I]``, any scale, float32 or better. It is scaled to unit mean diagonal, so that
            tied layers count equally whatever the scale of their inputs, and given a ridge of ``PRIOR_TOKENS / n``.
        num_tokens: Number ``n`` of inputs.
    """

    def __init__(self, moment: Tensor, num_tokens: int):
        self.scale = _unit_scale(moment.diagonal().double().sum(), len(moment))
        self.moment = moment / self.scale
        """Scaled ``C`` plus the ridge, ``[I, I]``, in the dtype given."""
        self.moment.diagonal().add_(PRIOR_TOKENS / num_tokens)

    @classmethod
    def total(cls, norms: Sequence[WeightedNorm]) -> Self:
        """Sum of norms, as they are scaled."""
        norm = cls.__new__(cls)
        norm.scale, norm.moment = 1.0, sum((each.moment for each in norms[1:]), norms[0].moment)
        return norm

    @cached_property
    def factor(self) -> Tensor:
        """Lower triangular ``S [I, I]`` with ``C = S Sᵀ``, float64."""
        return torch.linalg.cholesky(self.moment.double())

    def times(self, matrix: Tensor) -> Tensor:
        """``matrix [O, I] @ C``, in the better dtype of the two."""
        dtype = torch.promote_types(matrix.dtype, self.moment.dtype)
        return matrix.to(dtype) @ self.moment.to(dtype)

    def over(self, matrix: Tensor) -> Tensor:
        """``matrix [O, I] @ C⁻¹``, float64."""
        return torch.cholesky_solve(matrix.double().mT, self.factor).mT

    def error(self, difference: Tensor) -> float:
        """Squared output error ``tr(E C Eᵀ)`` of ``E [O, I]``."""
        return float((self.times(difference) * difference).double().sum())

    def low_rank(self, matrix: Tensor, rank: int) -> Factors:
        """Factors ``B = U Σ [O, r]``, ``A = Σ⁻¹ Uᵀ M [r, I]`` nearest to ``matrix M``, where ``M S = U Σ Vᵀ``.

        ``U`` are the leading eigenvectors of ``M C Mᵀ``.
        """
        if matrix.shape[0] <= matrix.shape[1] or is_small_rank(matrix, rank):
            return find_factors(matrix, self.times, rank)
        if rank >= min(matrix.shape):
            return full_rank_factors(matrix)
        matrix = matrix.double()
        squares, right = leading_eigenvectors(self._gram(matrix), rank)
        return scale_factors(matrix, squares, matrix @ (self.factor @ right) / squares.clamp_min(1e-300).sqrt())

    def fit(self, errors: Tensor, inputs: Tensor) -> Tensor:
        """Map ``D [O, I]`` of ``min_D Σ ‖e − D x‖² / scale + PRIOR_TOKENS / n ‖D‖²``, float64: ridge regression.

        Args:
            errors: ``e``, ``[n, O]``.
            inputs: ``x``, ``[n, I]``, of which this is the norm.
        """
        return self.over((errors.mT @ inputs).double() / self.scale)

    def squared_singular_values(self, matrix: Tensor) -> Tensor:
        """Squared singular values of ``matrix S``, descending: the error that each further rank removes."""
        return torch.linalg.eigvalsh(self._gram(matrix.double())).flip(0).clamp_min(0)

    def _gram(self, matrix: Tensor) -> Tensor:
        """Smaller Gram matrix of ``M S``: ``M C Mᵀ [O, O]``, or ``Sᵀ Mᵀ M S [I, I]`` where ``O > I``."""
        if matrix.shape[0] <= matrix.shape[1]:
            return self.times(matrix) @ matrix.mT
        whitened = matrix @ self.factor
        return whitened.mT @ whitened


class TokenNorm:
    """:class:`WeightedNorm` of few inputs ``x [n, I]``, ``n < I``, without the matrix ``C = XᵀX / scale + ridge``."""

    def __init__(self, inputs: Tensor):
        self.inputs = inputs
        self.scale = _unit_scale(inputs.square().sum(dtype=torch.float64), inputs.shape[1])
        self.ridge = PRIOR_TOKENS / len(inputs)

    def times(self, matrix: Tensor) -> Tensor:
        """``matrix [O, I] @ C``, in the inputs' dtype."""
        matrix = matrix.to(self.inputs.dtype)
        return ((matrix @ self.inputs.mT) @ self.inputs) / self.scale + self.ridge * matrix

    def low_rank(self, matrix: Tensor, rank: int) -> Factors:
        """Factors as of :meth:`WeightedNorm.low_rank`."""
        return find_factors(matrix, self.times, rank)

    def fit(self, errors: Tensor, inputs: Tensor) -> Tensor:
        """:meth:`WeightedNorm.fit` as ``D = Eᵀ (X Xᵀ + ridge scale)⁻¹ X``, ``[O, I]``."""
        products = second_moment(inputs.mT).double()
        products.diagonal().add_(self.ridge * self.scale)
        solved = torch.cholesky_solve(errors.double(), torch.linalg.cholesky(products))
        return solved.mT.to(inputs.dtype) @ inputs


class TiedNorms(list[WeightedNorm]):
    """Norms of the inputs of tied maps, by depth. The maps of a stage share them, and so the factor of their sum."""

    @cached_property
    def total(self) -> WeightedNorm:
        """Sum of the norms."""
        return WeightedNorm.total(self)

    @cached_property
    def difference(self) -> DifferenceNorm:
        """Norm of the difference of two tied maps."""
        return DifferenceNorm(*self, total=self.total)


class DifferenceNorm(WeightedNorm):
    """Norm of the difference ``E = W_0 − W_1`` of two tied maps: their error at the shared map nearest to both.

    ``min_W ‖W_0 − W‖²_0 + ‖W_1 − W‖²_1 = tr(E P Eᵀ)`` with the parallel sum ``P = C_0 (C_0 + C_1)⁻¹ C_1``.

    Args:
        first: Norm of ``C_0``.
        second: Norm of ``C_1``.
        total: Norm of ``C_0 + C_1``.
    """

    def __init__(self, first: WeightedNorm, second: WeightedNorm, *, total: WeightedNorm):
        self.first, self.second, self.sum = first, second, total
        self.scale = 1.0

    @cached_property
    def moment(self) -> Tensor:  # type: ignore[override]
        """``P [I, I]``, which only maps of more outputs than inputs need."""
        identity = torch.eye(len(self.first.moment), dtype=torch.float64, device=self.first.moment.device)
        moment = self.times(identity)
        return (moment + moment.mT) / 2

    def times(self, matrix: Tensor) -> Tensor:
        """``matrix [O, I] @ P``, in the better dtype of matrix and moments."""
        product = self.first.times(matrix)
        return self.second.times(self.sum.over(product).to(product.dtype))


def _unit_scale(trace: Tensor, width: int) -> float:
    return float((trace / width).clamp_min(1e-30))
