"""Dense controls of the same number of stored parameters: fewer layers, or low-rank linear maps.

Each control is the dense model reduced without training, as a recursive model is, to at most the size of a given
recursive model:

- :func:`drop_layers` keeps the first and last layers and inner ones at even distances, a stock model of the family;
- :func:`factorize` replaces every linear map of the layers by ``B A`` of one rank, found by truncated SVD, or with
  calibration text by SVD in the norm of the inputs' second moment (as SVD-LLM, arXiv 2403.07378, whitens).

A control is measured with ``W`` set to ``B A``, and counted as if the factors were stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recursify.convert.low_rank import truncated_svd
from recursify.convert.weighted_norm import InputNorm, input_norm

NUM_ENDS = 4
"""First and last layers that :func:`drop_layers` keeps: the most important ones, which the recursive rows keep, too."""


@dataclass(frozen=True)
class Control:
    """A smaller dense model.

    Attributes:
        model: Model in eval mode.
        num_parameters: Number of stored parameters; tied ones count once.
        description: Reduction that was applied to the dense model.
    """

    model: PreTrainedModel
    num_parameters: int
    description: str


def count_parameters(model: nn.Module) -> int:
    """Stored parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal language model of the Llama kind."""
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList), "base_model.layers is a ModuleList in every supported family"
    return layers


def layers_to_keep(num_layers: int, num_kept: int, num_ends: int = NUM_ENDS) -> list[int]:
    """The ends, and inner layers at even distances; fewer than both ends together are split between the ends."""
    if num_kept <= 2 * num_ends:
        first = (num_kept + 1) // 2
        return [*range(first), *range(num_layers - (num_kept - first), num_layers)]
    num_inner = num_kept - 2 * num_ends
    # The middles of equal stretches, so that no layer beside an end is kept or dropped for being there.
    stretch = (num_layers - 2 * num_ends) / num_inner
    inner = [num_ends + int((index + 0.5) * stretch) for index in range(num_inner)]
    return [*range(num_ends), *inner, *range(num_layers - num_ends, num_layers)]


def drop_layers(dense: PreTrainedModel, budget: int) -> Control:
    """The dense model with as many whole layers as ``budget`` parameters hold; ``save_pretrained`` works on it.

    Raises:
        ValueError: Not one layer fits.
    """
    layers = decoder_layers(dense)
    per_layer = count_parameters(layers[0])
    outside = count_parameters(dense) - sum(map(count_parameters, layers))
    num_kept = min(len(layers), (budget - outside) // per_layer)
    if num_kept < 1:
        raise ValueError(f"{budget} parameters hold {outside} outside the layers and not one layer of {per_layer}.")
    kept = layers_to_keep(len(layers), num_kept)
    config = copy.deepcopy(dense.config)
    config.num_hidden_layers = num_kept
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[position] for position in kept])
    model = _sharing_weights(dense)
    model.base_model.layers = nn.ModuleList([decoder_layers(model)[position] for position in kept])
    for index, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    description = f"{num_kept} of {len(layers)} layers: {', '.join(map(str, kept))}"
    return Control(model.eval(), count_parameters(model), description)


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    for index, layer in enumerate(decoder_layers(model)):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{index}.{path}", module


def _stored(shape: torch.Size, rank: int) -> int:
    """Parameters of a map of ``shape`` in factors of ``rank``, or whole where that is no more."""
    return min(rank * sum(shape), shape.numel())


def rank_within(model: PreTrainedModel, budget: int) -> tuple[int, int]:
    """The largest rank for all linear maps with which the model holds ``budget`` parameters at most.

    A map that factors of this rank would not make smaller stays whole.

    Returns:
        The rank, and the parameters stored with it.

    Raises:
        ValueError: Rank 1 is too large.
    """
    shapes = [linear.weight.shape for _, linear in _linears(model)]
    outside = count_parameters(model) - sum(shape.numel() for shape in shapes)
    highest = max(min(shape) for shape in shapes)

    def total(rank: int) -> int:
        return outside + sum(_stored(shape, rank) for shape in shapes)

    fitting = [rank for rank in range(1, highest + 1) if total(rank) <= budget]
    if not fitting:
        raise ValueError(f"{budget} parameters do not hold the model at rank 1, which takes {total(1)}.")
    return fitting[-1], total(fitting[-1])


class _Factorization:
    """Low-rank weights of a model's linear maps, found while it runs, layer by layer.

    Args:
        rank: Rank of all maps; a map that factors would not make smaller stays whole.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.num_factored = 0
        self._found: dict[nn.Linear, Tensor] = {}
        self._inputs: Tensor | None = None  # kept alive, so that identity means the same tensor
        self._norm: InputNorm | None = None

    def add(self, linear: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        """Factorize a map in the norm of its inputs; maps that are fed one tensor (q/k/v, gate/up) share the norm."""
        if self.rank * sum(linear.weight.shape) >= linear.weight.numel():
            return
        if self._inputs is not arguments[0]:
            self._inputs, self._norm = arguments[0], None  # the norm before this one is released first
            self._norm = input_norm(arguments[0].flatten(0, -2))
        assert self._norm is not None
        left, right = self._norm.low_rank(linear.weight, self.rank)
        self._found[linear] = (left @ right).to(linear.weight)

    def replace(self, *_: object) -> None:
        """Put the weights in, after the layer has run as it was, so that the next one is fed the dense activations."""
        for linear, weight in self._found.items():
            linear.weight = nn.Parameter(weight, requires_grad=False)
        self.num_factored += len(self._found)
        self._found.clear()
        self._inputs = self._norm = None


@torch.no_grad()
def factorize_(model: PreTrainedModel, budget: int, calibration: Tensor | None = None) -> Control:
    """Replace every linear map of a model's layers by factors of one rank, as high as ``budget`` allows, in place.

    One layer's second moments are in memory at a time; the text runs as one batch.

    Args:
        model: The dense model.
        budget: Stored parameters at most.
        calibration: Token ids ``[N, T]``, to make the factorization aware of activations; None for plain SVD.
    """
    rank, num_parameters = rank_within(model, budget)
    factorization = _Factorization(rank)
    linears = [linear for _, linear in _linears(model)]
    if calibration is None:
        for linear in linears:
            if rank * sum(linear.weight.shape) < linear.weight.numel():
                left, right = truncated_svd(linear.weight.float(), rank)
                linear.weight = nn.Parameter(left @ right, requires_grad=False)
                factorization.num_factored += 1
    else:
        handles = [linear.register_forward_pre_hook(factorization.add) for linear in linears]
        handles += [layer.register_forward_hook(factorization.replace) for layer in decoder_layers(model)]
        try:
            model.base_model(calibration, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    how = "plain SVD" if calibration is None else f"SVD whitened by {calibration.numel()} tokens"
    description = f"rank {rank} for {factorization.num_factored} of {len(linears)} linear maps, the others whole; {how}"
    return Control(model.eval(), num_parameters, description)


def factorize(dense: PreTrainedModel, budget: int, calibration: Tensor | None = None) -> Control:
    """:func:`factorize_` of a copy, which shares the weights that stay whole."""
    return factorize_(_sharing_weights(dense), budget, calibration)
