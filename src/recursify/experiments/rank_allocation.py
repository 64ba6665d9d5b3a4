"""Allocations of LoRA ranks to modules, at the number of parameters of uniform ranks.

Each further rank of a module costs ``R (I + O)`` parameters and removes the next singular values of its depths' errors
from sharing. Ranks are bought in order of gain per parameter until the budget of uniform ranks is spent. On
SmolLM2-135M, ``tail`` loses to uniform ranks (benchmarks/results/quality.md); ``fisher`` was not measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recursify.convert.calibration import Calibration, TiedLinears
from recursify.convert.initialization import average
from recursify.convert.sharing import share


def tail(calibration: Calibration) -> dict[str, int]:
    """Ranks by module, by output error relative to the energy of the output."""
    return _allocate(calibration, output_gains)


def fisher(calibration: Calibration) -> dict[str, int]:
    """Ranks by module, by weight error times the matrix's mean curvature: an estimate of the loss."""

    def gains(linears: TiedLinears) -> Tensor:
        curvatures = [float(curvature.mean()) for curvature in calibration.curvatures(linears.module)]
        return loss_gains(linears, curvatures)

    return _allocate(calibration, gains)


def output_gains(linears: TiedLinears) -> Tensor:
    """Fraction of the output's energy that each rank of all depths' residuals removes, ``[min(O, I)]``."""
    shared = share(linears.weights, linears.norms)
    pairs = zip(linears.weights, linears.norms, strict=True)
    return torch.stack(
        [norm.squared_singular_values(weight.double() - shared) / norm.error(weight) for weight, norm in pairs]
    ).sum(dim=0)


def loss_gains(linears: TiedLinears, curvatures: list[float]) -> Tensor:
    """Squared singular values times curvature that each rank of all depths' residuals removes, ``[min(O, I)]``."""
    shared = average(linears.weights)
    pairs = zip(linears.weights, curvatures, strict=True)
    return torch.stack([c * torch.linalg.svdvals(weight - shared).square() for weight, c in pairs]).sum(dim=0)


def _allocate(calibration: Calibration, measure_gains: Callable[[TiedLinears], Tensor]) -> dict[str, int]:
    gains: dict[str, Tensor] = {}
    costs: dict[str, int] = {}
    budget = 0
    for linears in calibration.tied_linears("allocate"):
        key = f"{linears.module.index}.{linears.module.path}"
        gains[key] = measure_gains(linears)
        costs[key] = len(linears.weights) * sum(linears.weights[0].shape)
        budget += linears.module.rank * costs[key]
    return spend(gains, costs, budget)


def spend(gains: dict[str, Tensor], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Buy ranks, at least 1 by module, in order of gain per parameter; ``costs`` and ``budget`` are in parameters."""
    ranks = dict.fromkeys(gains, 1)
    remaining = budget - sum(costs.values())
    offers = sorted(((float(gain) / costs[key], key) for key, tail in gains.items() for gain in tail[1:]), reverse=True)
    for _, key in offers:
        if costs[key] <= remaining:
            ranks[key] += 1
            remaining -= costs[key]
    return ranks
