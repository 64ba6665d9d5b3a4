"""Choice of a layout for a budget of parameters: prelude, coda, recursions, order, and a rank for every kind of map.

Every layout of 2 to 4 recursions is scored by the sum of the costs of its tied groups
(:class:`~recursify.convert.sharing_errors.SharingErrors`), with the ranks that spend the budget where they remove most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recursify.errors import PlanError
from recursify.modeling import LayerLayout
from recursify.progress import Progress

from .sharing_errors import Group, SharingErrors

RECURSIONS = (2, 3, 4)
RANK_STEP = 8
"""Step of ranks, and the least rank: drift correction refits residuals, and a map without one cannot be corrected."""
TABLE_SIZES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Budgets of the table, as fractions of the dense model's parameters."""
LOSS_FACTOR, LOSS_EXPONENT = 1.0, 0.74
"""Fit ``loss = factor · score ^ exponent``, nats per token above the dense model's, to conversions of SmolLM2-135M (4 +
(11 layers × 2) + 4 of rank 64 and 128, and 0 + (10 layers × 3) + 0 of rank 64; benchmarks/results/quality.csv)."""
MAX_LOSS = 20.0
"""Predictions beyond this loss are cut off: no model is worse."""


@dataclass(frozen=True)
class LayoutChoice:
    """Layout with ranks, and its prediction.

    Attributes:
        layout: Layout of the layers.
        ranks: Rank of every kind of map, by path.
        num_parameters: Stored parameters of the recursive model.
        size: Stored parameters relative to the dense model's.
        score: Predicted cost of its errors, added up over maps, in nats per token.
        perplexity: Predicted perplexity on the calibration text.
    """

    layout: LayerLayout
    ranks: dict[str, int]
    num_parameters: int
    size: float
    score: float
    perplexity: float

    def settings(self) -> dict[str, Any]:
        """Fields of :class:`~recursify.convert.settings.ConversionSettings`."""
        return {
            "num_recursions": self.layout.num_recursions,
            "sharing": self.layout.order,
            "num_prelude_layers": self.layout.num_prelude_layers,
            "num_coda_layers": self.layout.num_coda_layers,
            "lora_rank": max(self.ranks.values()),
            "lora_rank_pattern": self.ranks,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        figures = {"num_parameters": self.num_parameters, "size": self.size, "score": self.score}
        return {"layout": str(self.layout), **self.settings(), **figures, "perplexity": self.perplexity}


@dataclass(frozen=True)
class _Curves:
    """Costs of a layout's ranks.

    Attributes:
        layout: Layout.
        costs: Cost of every kind of map at rank ``RANK_STEP``, twice that, and so on, by path, ``[k]``.
        prices: Parameters of one rank of every kind of map, over all groups and depths, by path.
        num_parameters: Parameters of the model without residuals.
    """

    layout: LayerLayout
    costs: dict[str, Tensor]
    prices: dict[str, int]
    num_parameters: int


class LayoutSearch:
    """Scores of all layouts of one dense model.

    Args:
        errors: Costs of tied groups.
        num_parameters: Stored parameters of the dense model; tied ones count once.
        progress: Callback for progress.
    """

    def __init__(self, errors: SharingErrors, num_parameters: int, progress: Progress):
        self.errors = errors
        self.num_parameters = num_parameters
        self.shapes = errors.measurement.shapes
        self._group_costs: dict[Group, dict[str, Tensor]] = {}
        self._curves: list[_Curves] = []
        layouts = list(candidate_layouts(len(errors.measurement.layers)))
        for layout in layouts:
            self._curves.append(self._layout_curves(layout))
            progress("score", len(self._curves), len(layouts))

    def choose(self, num_parameters: int) -> LayoutChoice:
        """Layout of least predicted perplexity with at most ``num_parameters``.

        Raises:
            PlanError: No layout meets the budget; the message names the smallest.
        """
        choices = [choice for curves in self._curves if (choice := self._spend(curves, num_parameters))]
        if not choices:
            smallest = min(
                (self._choice(curves, dict.fromkeys(self.shapes, 1)) for curves in self._curves),
                key=lambda choice: choice.num_parameters,
            )
            raise PlanError(
                f"No layout of {RECURSIONS[0]} to {RECURSIONS[-1]} recursions stores at most {num_parameters:,} "
                f"parameters ({num_parameters / self.num_parameters:.3f} of the dense model's). The nearest is "
                f"{smallest.layout} with rank {RANK_STEP}: {smallest.num_parameters:,} ({smallest.size:.3f}). Use "
                f"--target-size {math.ceil(smallest.size * 1000) / 1000:g} or more."
            )
        return min(choices, key=lambda choice: choice.score)

    def front(self, sizes: Sequence[float] = TABLE_SIZES) -> list[LayoutChoice]:
        """Best layout of each of ``sizes`` that a layout meets: a Pareto front, from large to small."""
        choices = []
        for size in sizes:
            try:
                choices.append(self.choose(int(size * self.num_parameters)))
            except PlanError:
                break
        return choices

    def score(self, layout: LayerLayout, rank: int) -> LayoutChoice:
        """Prediction for a layout with one rank for all maps, rounded to a multiple of :data:`RANK_STEP`."""
        steps = max(1, round(rank / RANK_STEP))
        curves = self._layout_curves(layout)
        return self._choice(curves, {path: min(steps, len(costs)) for path, costs in curves.costs.items()})

    def predict(self, layout: LayerLayout, ranks: Mapping[str, int]) -> float:
        """Score of a layout with any rank for every kind of map, by path."""
        score = 0.0
        for index in range(layout.block_size):
            group = tuple(layout.positions(index))
            for path, cost in self.errors.cost(group).items():
                score += cost * float(self.errors.remaining(group, path, torch.tensor([ranks[path]])))
        return score

    def perplexity(self, score: float) -> float:
        """Predicted perplexity on the calibration text of a layout with this score."""
        loss = min(LOSS_FACTOR * score**LOSS_EXPONENT, MAX_LOSS)
        return self.errors.measurement.perplexity * math.exp(loss)

    def _layout_curves(self, layout: LayerLayout) -> _Curves:
        groups = [tuple(layout.positions(index)) for index in range(layout.block_size)]
        for group in groups:
            if group not in self._group_costs:
                costs, ranks = self.errors.cost(group), self._ranks()
                self._group_costs[group] = {
                    path: cost * self.errors.remaining(group, path, ranks[path]) for path, cost in costs.items()
                }
        curves = {
            path: torch.stack([self._group_costs[group][path] for group in groups]).sum(0) for path in self.shapes
        }
        prices = {path: len(groups) * layout.num_recursions * sum(shape) for path, shape in self.shapes.items()}
        shared = len(groups) * sum(rows * columns for rows, columns in self.shapes.values())
        return _Curves(layout, curves, prices, self.num_parameters - (layout.num_recursions - 1) * shared)

    def _ranks(self) -> dict[str, Tensor]:
        """Ranks that are considered, by path: up to the rank at which residuals are as large as unshared weights."""
        return {
            path: RANK_STEP * torch.arange(1, max(1, rows * columns // (rows + columns) // RANK_STEP) + 1)
            for path, (rows, columns) in self.shapes.items()
        }

    def _spend(self, curves: _Curves, num_parameters: int) -> LayoutChoice | None:
        """Buy ranks in order of gain per parameter; None if not even the least ranks fit."""
        steps = dict.fromkeys(self.shapes, 1)
        budget = num_parameters - curves.num_parameters - RANK_STEP * sum(curves.prices.values())
        if budget < 0:
            return None
        gains, prices, paths = [], [], []
        for path, costs in curves.costs.items():
            gains.append(costs[:-1] - costs[1:])
            prices.append(torch.full((len(costs) - 1,), RANK_STEP * curves.prices[path]))
            paths += [path] * (len(costs) - 1)
        price = torch.cat(prices)
        # Singular values descend, so gains of one path are in the order of its ranks; a stable sort keeps ties so.
        order = (torch.cat(gains) / price).argsort(descending=True, stable=True)
        for index in order[price[order].cumsum(0) <= budget].tolist():
            steps[paths[index]] += 1
        return self._choice(curves, steps)

    def _choice(self, curves: _Curves, steps: dict[str, int]) -> LayoutChoice:
        ranks = {path: RANK_STEP * count for path, count in steps.items()}
        score = sum(float(curves.costs[path][count - 1]) for path, count in steps.items())
        num_parameters = curves.num_parameters + sum(curves.prices[path] * rank for path, rank in ranks.items())
        size = num_parameters / self.num_parameters
        return LayoutChoice(curves.layout, ranks, num_parameters, size, score, self.perplexity(score))


def candidate_layouts(num_layers: int) -> Iterator[LayerLayout]:
    """Iterate over the layouts of 2 to 4 recursions in both orders.

    Every other one, or fewer, are taken where there are more than 40 layers. A block of few layers in ``sequence`` ties
    neighbours and nothing else.
    """
    stride = math.ceil(num_layers / 40)
    for recursions in RECURSIONS:
        for block_size in range(stride, num_layers // recursions + 1, stride):
            unshared = num_layers - block_size * recursions
            for prelude in range(0, unshared + 1, stride):
                for order in ("cycle", "sequence") if block_size > 1 else ("cycle",):
                    yield LayerLayout(
                        num_prelude_layers=prelude,
                        block_size=block_size,
                        num_recursions=recursions,
                        num_coda_layers=unshared - prelude,
                        order=order,
                    )
