"""Initialization strategies for the shared weights, published ones and ours.

A strategy selects the dense layers that initialize each shared layer; the weights of several are averaged. To add one,
add an entry to :data:`INITIALIZATIONS`; the tests run over the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recursify.errors import PlanError
from recursify.modeling import LayerLayout


@dataclass(frozen=True)
class Initialization:
    """Initialization strategy for shared weights.

    Attributes:
        name: Value of ``--init``.
        sources: Function of a layout and a generator that returns the source positions of each block layer.
        needs_text: True if it needs activations of the dense model on a text.
        from_scratch: True if shared weights are random, independent of the sources.
        reference: Publication or page that describes it.
    """

    name: str
    sources: Callable[[LayerLayout, torch.Generator], list[list[int]]]
    needs_text: bool = False
    from_scratch: bool = False
    reference: str = "Relaxed Recursive Transformers, arXiv 2410.20672"

    def weight(self, sources: list[Tensor], std: float, generator: torch.Generator) -> Tensor:
        """Shared weight ``[O, I]`` from the source layers' weights; ``std`` is that of a random one."""
        if self.from_scratch:
            return torch.randn(sources[0].shape, generator=generator) * std
        return sources[0] if len(sources) == 1 else average(sources)


def _stepwise(layout: LayerLayout, generator: torch.Generator) -> list[list[int]]:
    """Evenly spaced layers from first to last; halves round to even, as in the authors' later code.

    For a block of one layer it is the first.
    """
    first, last = _inner(layout)
    return [[round(x)] for x in np.linspace(first, last, layout.block_size).tolist()]


def _tied(layout: LayerLayout, generator: torch.Generator) -> list[list[int]]:
    """All layers of the tied group."""
    return [layout.positions(index) for index in range(layout.block_size)]


def _lower(layout: LayerLayout, generator: torch.Generator) -> list[list[int]]:
    """The first layers after the prelude."""
    first, _ = _inner(layout)
    return [[first + index] for index in range(layout.block_size)]


def _upper(layout: LayerLayout, generator: torch.Generator) -> list[list[int]]:
    """The last layers before the coda."""
    _, last = _inner(layout)
    return [[last - layout.block_size + 1 + index] for index in range(layout.block_size)]


def _random_choice(layout: LayerLayout, generator: torch.Generator) -> list[list[int]]:
    """A random sample of the inner layers, in their order."""
    first, last = _inner(layout)
    drawn = torch.randperm(last - first + 1, generator=generator)[: layout.block_size]
    return [[first + offset] for offset in sorted(drawn.tolist())]


def _inner(layout: LayerLayout) -> tuple[int, int]:
    """First and last position of the shared block."""
    return layout.num_prelude_layers, layout.num_layers - layout.num_coda_layers - 1


INITIALIZATIONS = {
    entry.name: entry
    for entry in (
        Initialization("stepwise", _stepwise),
        Initialization("average", _tied),
        Initialization("lower", _lower),
        Initialization("upper", _upper, reference="Mixture-of-Recursions, arXiv 2507.10524, table 12"),
        Initialization("random_choice", _random_choice, reference="Mixture-of-Recursions, arXiv 2507.10524, table 12"),
        Initialization("random", _tied, from_scratch=True),
        Initialization("calibrated", _tied, needs_text=True, reference="recursify, docs/calibration.md"),
        Initialization("fisher", _tied, needs_text=True, reference="after CAMP-HiVe, arXiv 2511.06265"),
    )
}


def find_initialization(name: str) -> Initialization:
    """Initialization called ``name``; a PlanError if there is none."""
    if name not in INITIALIZATIONS:
        raise PlanError(f"Unknown initialization '{name}'. Use one of: auto, {', '.join(INITIALIZATIONS)}.")
    return INITIALIZATIONS[name]


def average(weights: list[Tensor], importances: list[Tensor] | None = None) -> Tensor:
    """Mean of ``weights`` (one shape, any float dtype) in float32, summed in this order.

    ``importances``, non-negative tensors of the same shape (Fisher information), weight it elementwise.
    """
    if importances is None:
        total = weights[0].to(torch.float32, copy=True)
        for weight in weights[1:]:
            total.add_(weight)  # in place: 92 MB against 184 for two matrices of a 1.1B model, and a third of the time
        return total.div_(len(weights))
    stacked, weighting = (torch.stack([tensor.float() for tensor in tensors]) for tensors in (weights, importances))
    # The floor gives elements of zero importance at all depths their plain mean instead of 0/0.
    weighting = weighting + 1e-6 * weighting.mean().clamp_min(1e-30)
    return (stacked * weighting).sum(dim=0) / weighting.sum(dim=0)
