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

from recursify.convert.low_rank import WeightedNorm, truncated_svd

NUM_ENDS = 4
"""First and last layers that :func:`drop_layers` keeps: the most important ones, which the recursive rows keep, too."""

TOKENS_PER_BATCH = 4096


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
    model = copy.deepcopy(dense)
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


@torch.inference_mode()
def input_moments(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """Second moments ``Σ x xᵀ`` (float64) of the inputs of every linear map of the layers.

    Args:
        model: The dense model.
        windows: Token ids ``[N, T]``.

    Returns:
        Name of the map -> ``[I, I]``. Maps that are fed one tensor (q/k/v, gate/up) share one.
    """
    moments: dict[str, Tensor] = {}
    latest: list[tuple[Tensor, str]] = []  # the tensor is kept alive, so that identity means the same tensor
    leader: dict[str, str] = {}

    def look(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not (latest and latest[0][0] is arguments[0]):
                latest[:] = [(arguments[0], name)]
                rows = arguments[0].flatten(0, -2)
                product = (rows.mT @ rows).double()
                moments[name] = moments[name] + product if name in moments else product
            leader[name] = latest[0][1]

        return hook

    handles = [linear.register_forward_pre_hook(look(name)) for name, linear in _linears(model)]
    try:
        for batch in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])):
            model.base_model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments[first] for name, first in leader.items()}


@torch.no_grad()
def factorize(dense: PreTrainedModel, budget: int, calibration: Tensor | None = None) -> Control:
    """The dense model with every linear map of its layers in factors of one rank, as high as ``budget`` allows.

    Args:
        dense: The dense model; a copy is changed.
        budget: Stored parameters at most.
        calibration: Token ids ``[N, T]``, to make the factorization aware of activations; None for plain SVD.
    """
    rank, num_parameters = rank_within(dense, budget)
    moments = input_moments(dense, calibration) if calibration is not None else {}
    model = copy.deepcopy(dense)
    num_factored, norms = 0, {}
    linears = list(_linears(model))
    for name, linear in linears:
        weight = linear.weight
        if rank * sum(weight.shape) >= weight.numel():
            continue
        if calibration is None:
            left, right = truncated_svd(weight.float(), rank)
        else:
            moment = moments[name]
            if id(moment) not in norms:
                norms = {id(moment): WeightedNorm(moment)}
            left, right = norms[id(moment)].low_rank(weight, rank)
        weight.copy_(left @ right)
        num_factored += 1
    how = "plain SVD" if calibration is None else f"SVD whitened by {calibration.numel()} tokens"
    description = f"rank {rank} for {num_factored} of {len(linears)} linear maps, the others whole; {how}"
    return Control(model.eval(), num_parameters, description)
