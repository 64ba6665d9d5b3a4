"""Residuals: their error is the tail of the spectrum, and falls with rank to nothing."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from recursify.convert.low_rank import truncated_svd
from recursify.convert.relaxation import RELAXATIONS, find_relaxation
from recursify.convert.sharing import share, share_for_residuals
from recursify.convert.weighted_norm import TiedNorms, WeightedNorm
from recursify.errors import PlanError

NUM_TOKENS = 2**20
"""Number of tokens by which a norm's ridge is small."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(width: int, seed: int) -> torch.Tensor:
    rows = draw(4 * width, width, seed=seed) * torch.linspace(3, 0.1, width, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("rank", [1, 5, 12, 20])
def test_truncated_svd_error_is_the_tail(rank):
    """Eckart-Young: the error is the root of the squared singular values left out."""
    matrix = draw(20, 31)
    left, right = truncated_svd(matrix, rank)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    assert left.shape == (20, rank)
    assert right.shape == (rank, 31)
    torch.testing.assert_close((matrix - left @ right).norm(), tail, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (17, 17)])
def test_weighted_low_rank_is_optimal(shape):
    """In the weighted norm, the error equals the tail of the spectrum, and plain SVD is no better."""
    matrix, norm = draw(*shape), WeightedNorm(moment(shape[1], seed=1), NUM_TOKENS)
    for rank in (1, 7, min(shape)):
        left, right = norm.low_rank(matrix, rank)
        error = norm.error(matrix - left @ right)
        tail = float(norm.squared_singular_values(matrix)[rank:].sum())
        torch.testing.assert_close(error, tail, atol=1e-8, rtol=1e-6)
        plain_left, plain_right = truncated_svd(matrix, rank)
        assert error <= norm.error(matrix - plain_left @ plain_right) + 1e-9


def test_white_inputs_make_the_norm_plain():
    """With uncorrelated inputs, calibrated equals published: the mean, and the truncated SVD."""
    norm = WeightedNorm(torch.eye(12, dtype=torch.float64), NUM_TOKENS)
    weights = [draw(9, 12, seed=s) for s in range(3)]
    torch.testing.assert_close(share(weights, TiedNorms([norm] * 3)), sum(weights) / 3)
    left, right = norm.low_rank(weights[0], 4)
    plain_left, plain_right = truncated_svd(weights[0], 4)
    torch.testing.assert_close(left @ right, plain_left @ plain_right)


def test_shared_weight_minimizes_the_weighted_error():
    """No perturbation of the shared weight lowers the sum of errors."""
    weights = [draw(9, 12, seed=s) for s in range(2)]
    norms = TiedNorms(WeightedNorm(moment(12, seed=s), NUM_TOKENS) for s in range(2))
    shared = share(weights, norms)
    best = sum(norm.error(w - shared) for w, norm in zip(weights, norms, strict=True))
    for seed in range(5):
        moved = shared + 1e-3 * draw(9, 12, seed=10 + seed)
        assert best < sum(norm.error(w - moved) for w, norm in zip(weights, norms, strict=True))


def joint_error(weights, norms, shared, rank) -> float:
    total = 0.0
    for weight, norm in zip(weights, norms, strict=True):
        left, right = norm.low_rank(weight - shared, rank)
        total += norm.error(weight - shared - left @ right)
    return total


def test_sharing_with_residuals_in_mind_beats_averaging_first():
    """And more sweeps never raise the error."""
    weights = [draw(24, 30, seed=s) for s in range(3)]
    norms = TiedNorms(WeightedNorm(moment(30, seed=s), NUM_TOKENS) for s in range(3))
    averaged = joint_error(weights, norms, share(weights, norms), 4)
    errors = [
        joint_error(weights, norms, share_for_residuals(weights, norms, 4, num_sweeps=sweeps), 4)
        for sweeps in (1, 2, 4, 8)
    ]
    assert errors[0] < averaged
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))


@pytest.mark.parametrize(("shape", "rank"), [((24, 30), 4), ((30, 24), 4), ((61, 40), 2), ((9, 12), 5)])
def test_two_layers_are_shared_at_the_optimum(shape, rank):
    """The error is the tail of the difference's spectrum after 2r, and alternating minimization cannot lower it."""
    weights = [draw(*shape, seed=s) for s in range(2)]
    norms = TiedNorms(WeightedNorm(moment(shape[1], seed=s), NUM_TOKENS) for s in range(2))
    shared = share_for_residuals(weights, norms, rank)
    error = joint_error(weights, norms, shared, rank)
    difference = weights[0] - weights[1]
    tail = float(norms.difference.squared_singular_values(difference)[2 * rank :].sum())
    assert error == pytest.approx(tail, rel=1e-3, abs=1e-9)
    for _ in range(3):
        residuals = [norm.low_rank(weight - shared, rank) for weight, norm in zip(weights, norms, strict=True)]
        without = [weight - b @ a for weight, (b, a) in zip(weights, residuals, strict=True)]
        shared = share(without, norms)
    assert joint_error(weights, norms, shared, rank) >= tail * (1 - 1e-3) - 1e-9


def test_the_norm_of_a_difference_is_the_error_of_the_best_shared_weight():
    weights = [draw(9, 12, seed=s) for s in range(2)]
    norms = TiedNorms(WeightedNorm(moment(12, seed=s), NUM_TOKENS) for s in range(2))
    shared = share(weights, norms)
    error = sum(norm.error(weight - shared) for weight, norm in zip(weights, norms, strict=True))
    assert norms.difference.error(weights[0] - weights[1]) == pytest.approx(error)


def test_norms_are_released_with_their_last_reference():
    """No cycle keeps them until the garbage collector runs: those of one wide map are gigabytes."""
    norms = TiedNorms(WeightedNorm(moment(12, seed=s), NUM_TOKENS) for s in range(2))
    share_for_residuals([draw(12, 12, seed=s) for s in range(2)], norms, 2)
    references = [weakref.ref(norm) for norm in (*norms, norms.total, norms.difference)]
    gc.disable()
    try:
        del norms
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


def test_two_residuals_cover_twice_the_rank():
    """Two layers that differ by rank 2r are recovered exactly by two residuals of rank r."""
    base, norm = draw(24, 30), WeightedNorm(moment(30, seed=1), NUM_TOKENS)
    difference = draw(24, 8, seed=2) @ draw(8, 30, seed=3)
    weights = [base, base + difference]
    norms = TiedNorms([norm, norm])
    shared = share_for_residuals(weights, norms, 4)
    assert joint_error(weights, norms, shared, 4) < 1e-9 * norm.error(difference)
    assert joint_error(weights, norms, share(weights, norms), 4) > 1e-3 * norm.error(difference)


def test_rank_sweep_is_monotone_and_ends_at_zero(tmp_path):
    """On disk: error against the dense weights falls with rank, is the SVD tail, and vanishes at full rank."""
    dense = save_tiny(tmp_path / "dense")
    errors = []
    for rank in (0, 2, 8, 16, 31, 32):
        model = convert_tiny(tmp_path / "dense", tmp_path / "out", sharing="cycle", lora_rank=rank)
        module = model.model.block[1].mlp.down_proj
        wanted = [dense.model.layers[p].mlp.down_proj.weight for p in (1, 4)]
        errors.append(sum(float((module.merged_weight(d) - w).norm() ** 2) for d, w in enumerate(wanted)))
        tails = [torch.linalg.svdvals(w - module.linear.weight)[rank:].square().sum() for w in wanted]
        assert abs(errors[-1] - float(sum(tails))) <= 0.01 * errors[-1] + 1e-9
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_zero_relaxation_changes_nothing(tmp_path):
    """LoRA's usual start computes what the tied model computes, and its A is ready to train."""
    save_tiny(tmp_path / "dense")
    tied = convert_tiny(tmp_path / "dense", tmp_path / "tied", lora_rank=0)
    relaxed = convert_tiny(tmp_path / "dense", tmp_path / "relaxed", lora_rank=4, relaxation="zero")
    ids = random_ids(2, 9)
    with torch.inference_mode():
        assert torch.equal(tied(ids).logits, relaxed(ids).logits)
    assert relaxed.model.block[0].mlp.up_proj.lora_a.abs().min() > 0


def test_svd_beats_zero_at_every_rank(tmp_path):
    """Per-layer weight error (provable), and here also the distance of logits from the dense model's."""
    dense = save_tiny(tmp_path / "dense")
    ids = random_ids(4, 24)
    with torch.inference_mode():
        wanted = dense(ids).logits
        for rank in (8, 16):
            distances = [
                (
                    convert_tiny(tmp_path / "dense", tmp_path / "o", lora_rank=rank, relaxation=r)(ids).logits - wanted
                ).norm()
                for r in ("svd", "zero")
            ]
            assert distances[0] < distances[1]


def test_ranks_by_module(tmp_path):
    """A pattern gives modules ranks of their own, also per block layer."""
    save_tiny(tmp_path / "dense")
    model = convert_tiny(
        tmp_path / "dense", tmp_path / "out", sharing="cycle", lora_rank=3,
        lora_rank_pattern={"mlp.down_proj": 7, "0.self_attn.q_proj": 0},
    )  # fmt: skip
    block = model.model.block
    assert [layer.mlp.down_proj.rank for layer in block] == [7, 7, 7]
    assert [layer.self_attn.q_proj.rank for layer in block] == [0, 3, 3]
    assert block[0].self_attn.q_proj.lora_a is None


def test_unknown_relaxation_lists_those_that_exist():
    """A misspelt name is answered with the names."""
    with pytest.raises(PlanError, match=r"Unknown relaxation 'pca'\. Use one of: auto, svd, zero, calibrated"):
        find_relaxation("pca")
    assert set(RELAXATIONS) == {"svd", "zero", "calibrated"}
