"""Norms of inputs: token space agrees with feature space, regression with least squares, iteration with LAPACK."""

from __future__ import annotations

import pytest
import torch

from recursify.convert import low_rank
from recursify.convert.low_rank import find_factors, iterate_subspace, leading_eigenvectors
from recursify.convert.weighted_norm import (
    BLOCK,
    PRIOR_TOKENS,
    TokenNorm,
    WeightedNorm,
    input_norm,
    second_moment,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [7, BLOCK, 2 * BLOCK + 31])
def test_second_moment_is_the_product(width):
    """Blocks of every size, also an odd last one."""
    inputs = draw(40, width)
    torch.testing.assert_close(second_moment(inputs), inputs.mT @ inputs)


def test_few_tokens_are_kept_as_they_are():
    """Token space below as many tokens as features, feature space from there on."""
    assert isinstance(input_norm(draw(11, 12)), TokenNorm)
    assert isinstance(input_norm(draw(12, 12)), WeightedNorm)


@pytest.mark.parametrize("outputs", [9, 40])
def test_token_space_is_feature_space(outputs):
    """Products, factors and regressions of the same inputs."""
    inputs, errors, matrix = draw(13, 30), draw(13, outputs, seed=1), draw(outputs, 30, seed=2)
    tokens, features = TokenNorm(inputs), WeightedNorm(second_moment(inputs), len(inputs))
    assert tokens.scale == pytest.approx(features.scale)
    torch.testing.assert_close(tokens.times(matrix), features.times(matrix))
    torch.testing.assert_close(tokens.fit(errors, inputs), features.fit(errors, inputs))
    for rank in (2, 8, 30):
        products = [b.double() @ a.double() for b, a in (norm.low_rank(matrix, rank) for norm in (tokens, features))]
        errors_of = [features.error(matrix - product) for product in products]
        assert errors_of[0] == pytest.approx(errors_of[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("num_tokens", [13, 60])
def test_regression_is_least_squares_with_a_ridge(num_tokens):
    """The map of ``fit`` solves the problem with one further row per input feature."""
    inputs, errors = draw(num_tokens, 30), draw(num_tokens, 9, seed=1)
    norm = input_norm(inputs)
    ridge = (PRIOR_TOKENS / num_tokens * inputs.square().sum() / 30).sqrt() * torch.eye(30, dtype=torch.float64)
    rows, targets = torch.cat([inputs, ridge]), torch.cat([errors, torch.zeros(30, 9, dtype=torch.float64)])
    torch.testing.assert_close(norm.fit(errors, inputs), torch.linalg.lstsq(rows, targets).solution.mT)


@pytest.mark.parametrize("shape", [(192, 300), (300, 192)])
def test_iterated_subspace_loses_little(shape):
    """On a slowly decaying spectrum, at most half a percent above the smallest error."""
    matrix = draw(*shape).float()
    moment = second_moment(draw(500, shape[1], seed=1).float())
    product = matrix @ moment
    found = iterate_subspace(matrix, product, 24)
    assert found is not None
    squares, vectors = found
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(24), atol=1e-5, rtol=0)
    gram = (product @ matrix.mT).double()
    best, _ = leading_eigenvectors(gram, 24)
    lost = (gram.trace() - squares.sum()) / (gram.trace() - best.sum()) - 1
    assert -1e-6 < lost < 5e-3


def test_lapack_takes_over_where_iteration_does_not_converge(monkeypatch):
    """The result is the best approximation nevertheless."""
    monkeypatch.setattr(low_rank, "MAX_PRODUCTS", 1)
    matrix = draw(192, 300)
    assert iterate_subspace(matrix.float(), matrix.float(), 24) is None
    left, right = find_factors(matrix, lambda rows: rows, 24)
    tail = torch.linalg.svdvals(matrix)[24:].square().sum().sqrt()
    torch.testing.assert_close((matrix - left @ right).norm(), tail)
