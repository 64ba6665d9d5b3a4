"""Errors of tied linear maps by rank, predicted from a sample without solving for the residuals.

For two tied maps the least error is the tail of the singular values of ``W_0 − W_1`` after the first ``2 r``, in the
norm of a difference (:class:`~recursify.convert.weighted_norm.DifferenceNorm`). For ``R`` tied maps, ``r`` ranks each
remove ``r R / (R − 1)`` directions of a common subspace, of which the shared weight holds one map's part.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint

from .calibration import SHARE_TOKENS
from .layout_measurement import DenseMeasurement
from .sharing import share
from .weighted_norm import PRIOR_TOKENS, TiedNorms, WeightedNorm

COPY_TOLERANCE = 1e-8
"""Error of sharing, relative to the energy of the output, below which two layers are copies of one another."""

Group = tuple[int, ...]
"""Positions of the layers that a tied group has, by depth."""


class SharingErrors:
    """Predicted cost of tying groups of layers, in nats per token, by linear map and rank.

    Args:
        checkpoint: Dense model, of which a few layers are read again.
        stem: Name of its list of layers (``model.layers``).
        measurement: Measurement of the same model.
    """

    def __init__(self, checkpoint: DenseCheckpoint, stem: str, measurement: DenseMeasurement):
        self.checkpoint = checkpoint
        self.stem = stem
        self.measurement = measurement
        self._costs: dict[Group, dict[str, float]] = {}

    def cost(self, group: Group) -> dict[str, float]:
        """Cost of tying the layers of ``group`` without residuals, by path."""
        if group not in self._costs:
            self._costs[group] = {}
            for stage in self.measurement.stages:
                self._costs[group].update(self._stage_cost(group, stage))
        return self._costs[group]

    def remaining(self, group: Group, path: str, ranks: Tensor) -> Tensor:
        """Fraction of the cost that remains with residuals of each of ``ranks [k]``."""
        spacing, middle = group[1] - group[0], (group[0] + group[-1]) / 2
        curve = min(self._curves, key=lambda pair: abs(pair[1] - pair[0] - spacing) + abs(sum(pair) / 2 - middle))
        fractions = self._curves[curve][path]
        index = (ranks * len(group) / (len(group) - 1)).clamp_max(len(fractions) - 1)
        low = index.floor().long()
        return torch.lerp(fractions[low], fractions[(low + 1).clamp_max(len(fractions) - 1)], index - low)

    def _stage_cost(self, group: Group, stage: list[str]) -> dict[str, float]:
        samples = [self.measurement.layers[position] for position in group]
        counts = [len(samples[0].rows[path]) for path in stage]
        weights = [torch.cat([sample.rows[path] for path in stage]) for sample in samples]
        costs = dict.fromkeys(stage, 0.0)
        for sample, errors in zip(samples, self._shared_errors(group, stage[0], weights), strict=True):
            for path, rows in zip(stage, errors.split(counts), strict=True):
                costs[path] += float(rows.square().mean(0) @ sample.costs[path])
        return costs

    def _shared_errors(self, group: Group, path: str, weights: list[Tensor]) -> list[Tensor]:
        """Output errors ``[O, n]`` of the best shared weight, by depth."""
        samples = [self.measurement.layers[position] for position in group]
        inputs = [sample.inputs[path].float() for sample in samples]
        if path in samples[0].moments:
            shared = share(weights, self._norms(group, path)).float()
            return [(weight - shared) @ x.mT for weight, x in zip(weights, inputs, strict=True)]
        # More features than tokens: in token space, with the error on each token of a fit to the others.
        stacked = torch.cat(inputs)
        kernel = stacked @ stacked.mT
        kernel.diagonal().add_(PRIOR_TOKENS / SHARE_TOKENS * len(stacked))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
        mean = torch.stack(weights).mean(0)
        targets = torch.cat([(weight - mean) @ x.mT for weight, x in zip(weights, inputs, strict=True)], dim=1)
        return list((targets @ inverse / inverse.diagonal()).split(len(inputs[0]), dim=1))

    def _norms(self, group: Group, path: str) -> TiedNorms:
        """Norms of the inputs of a tied group, as a conversion on ``SHARE_TOKENS`` tokens has them."""
        layers = self.measurement.layers
        return TiedNorms(WeightedNorm(layers[position].moments[path], SHARE_TOKENS) for position in group)

    @cached_property
    def _curves(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """Fraction of the error that remains after each number of directions, by path, of pairs across the model."""
        return {pair: self._pair_curves(pair) for pair in sampled_pairs(len(self.measurement.layers))}

    def _pair_curves(self, pair: tuple[int, int]) -> dict[str, Tensor]:
        curves = {}
        for stage in self.measurement.stages:
            for path in stage:
                name = "{}.{}.{}.weight"
                weights = [self.checkpoint.read(name.format(self.stem, position, path)).float() for position in pair]
                squares = self._squared_singular_values(pair, stage[0], weights)
                # Layers that are copies have nothing to remove, and their rounding errors say nothing of ranks.
                is_copy = squares.sum() < COPY_TOLERANCE * weights[0].square().sum()
                curves[path] = torch.ones(len(squares) + 1) if is_copy else _fractions(squares)
        return curves

    def _squared_singular_values(self, pair: tuple[int, int], path: str, weights: list[Tensor]) -> Tensor:
        """Squared singular values of ``W_0 − W_1`` in the norm of a difference, descending, float32."""
        if path in self.measurement.layers[pair[0]].moments:
            norm = self._norms(pair, path).difference
            return norm.squared_singular_values(weights[0] - weights[1]).float()
        # ``W_0 − W``, for the best ``W`` without residuals, has nearly the same ones but for a factor.
        errors = self._shared_errors(pair, path, weights)[0]
        smaller = errors if len(errors) <= errors.shape[1] else errors.mT
        return torch.linalg.eigvalsh(smaller @ smaller.mT).flip(0).clamp_min(0) / errors.shape[1]


def sampled_pairs(num_layers: int) -> list[tuple[int, int]]:
    """Pairs of positions, near and far, early and late, on which curves by rank are measured."""
    spacings = sorted({1, max(1, num_layers // 4), max(1, num_layers // 2)})
    return sorted(
        {
            (first, first + spacing)
            for spacing in spacings
            for first in (round((num_layers - 1 - spacing) * part) for part in (0.15, 0.5, 0.85))
        }
    )


def _fractions(squares: Tensor) -> Tensor:
    """Fraction of the sum that remains after each number of leading values, ``[n + 1]``."""
    tail = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)]) / tail[0]
