"""Measurement of a dense model for the choice of a layout: inputs of its linear maps, and what errors there cost.

One pass forward and one backward over a short text, one or two layers in memory at a time. The backward pass starts at
labels drawn from the model's own predictions, so that gradients ``g`` of their loss measure the KL divergence that an
error ``e`` of a map's output causes, to second order: ``½ E[(gᵀ e)²]``, estimated as ``½ E[‖g‖² ‖e‖²] / O`` for the
``O`` outputs of the map. A layer's costs are then scaled to what errors of that layer were seen to cause
(:mod:`recursify.convert.layout_sensitivity`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.dense_names import DenseNames
from recursify.checkpoint.layerwise import Layerwise
from recursify.modeling import RecursiveConfig
from recursify.progress import Progress

from .layout_sensitivity import PERTURBATION, PerturbedRuns, partner

SAMPLED_ROWS = 128
"""Rows of each weight that errors of sharing are computed on; every row of a shared weight is solved independently."""
WIDE_TOKENS = 512
"""Tokens, evenly spaced over the text, that are kept of inputs with more features than the text has tokens."""
IGNORED = -100
LOGIT_ROWS = 256
"""Tokens whose logits are in memory at once."""


@dataclass
class LayerSample:
    """Sample of a dense layer.

    Attributes:
        inputs: Inputs by the first path of each stage, ``[n, I]``, bfloat16, divided by their root mean square, so that
            second moments have unit mean diagonal as in :class:`~recursify.convert.weighted_norm.WeightedNorm`. Only
            :data:`WIDE_TOKENS` are kept where there are more features than tokens.
        moments: Sums ``Σ x xᵀ [I, I]`` of the other inputs, float32, by the same paths.
        costs: KL divergence in nats, divided by ``n``, that a mean squared output error of 1 at each of these tokens
            causes; by path, ``[n]``, float32.
        rows: Sampled rows of each weight, by path, ``[rows, I]``, float32.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    costs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DenseMeasurement:
    """Measurement of all layers.

    Attributes:
        stages: Paths of a layer's linear maps, grouped by their input.
        shapes: Shape ``(O, I)`` of each linear map.
        layers: Samples by position.
        perplexity: Perplexity of the dense model on the text.
        num_tokens: Number of tokens of the text.
    """

    stages: list[list[str]]
    shapes: dict[str, tuple[int, int]]
    layers: list[LayerSample]
    perplexity: float
    num_tokens: int


def measure_dense(
    checkpoint: DenseCheckpoint, config: RecursiveConfig, windows: Tensor, *, device: str, progress: Progress
) -> DenseMeasurement:
    """Measure a dense model on token windows ``[N, T]``.

    In memory: one layer, the hidden states ``[N, T, D]`` of every position, and the samples; at the end of the model,
    its head.
    """
    dense = Layerwise(checkpoint, config, device)
    num_layers = config.num_hidden_layers
    with torch.no_grad():
        hidden = [torch.cat(dense.embed(windows))]
        runs = PerturbedRuns(dense, hidden[0])
        for position in range(num_layers):
            hidden.append(dense.run(dense.load(position), position, hidden[-1]))
            runs.advance(position)
            progress("measure", position + 1, 2 * num_layers)
        head = _Head(checkpoint, dense)
        divergences = runs.divergences(head)
    gradient, perplexity = head.gradient_of_loss(hidden.pop(), windows)
    del head
    layers = [LayerSample() for _ in range(num_layers)]
    for position in reversed(range(num_layers)):
        layer = dense.load(position)
        gradient = _measure_layer(dense, layer, position, (hidden.pop(), gradient), layers[position])
        progress("measure", 2 * num_layers - position, 2 * num_layers)
    shapes = {path: tuple(layer.get_parameter(f"{path}.weight").shape) for stage in dense.stages for path in stage}
    _scale_costs(layers, dense.stages, divergences)
    return DenseMeasurement(dense.stages, cast(Any, shapes), layers, perplexity, windows.numel())


def _scale_costs(layers: list[LayerSample], stages: list[list[str]], divergences: list[float]) -> None:
    """Scale the costs of each layer, which gradients predict, to the divergence that its perturbation caused."""
    predictions = []
    for position, sample in enumerate(layers):
        other = layers[partner(position, len(layers))]
        prediction = 0.0
        for stage in stages:
            inputs = sample.inputs[stage[0]].float()
            for path in stage:
                errors = inputs @ (PERTURBATION * (other.rows[path] - sample.rows[path])).mT
                prediction += float(errors.square().mean(1) @ sample.costs[path])
        predictions.append(prediction)
    for sample, divergence, prediction in zip(layers, divergences, predictions, strict=True):
        for path in sample.costs:
            sample.costs[path] *= divergence / max(prediction, 1e-30)


def _measure_layer(
    dense: Layerwise, layer: nn.Module, position: int, hidden_and_gradient: tuple[Tensor, Tensor], sample: LayerSample
) -> Tensor:
    """Fill ``sample`` of a layer, given its input and the gradient of its output; returns the gradient of its input."""
    hidden, gradient = hidden_and_gradient
    outputs: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    kept: dict[str, Tensor] = {}

    def record(path: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs[path] = output
        if path in {stage[0] for stage in dense.stages}:
            inputs = arguments[0].detach().flatten(0, -2)
            scales[path] = float(inputs.square().mean().sqrt().clamp_min(1e-15))
            inputs = inputs / scales[path]
            kept[path] = torch.arange(len(inputs))
            if inputs.shape[1] > len(inputs):
                kept[path] = torch.linspace(0, len(inputs) - 1, min(WIDE_TOKENS, len(inputs))).long()
            else:
                sample.moments[path] = (inputs.mT @ inputs).cpu()
            sample.inputs[path] = inputs[kept[path]].to("cpu", torch.bfloat16)

    for path in (path for stage in dense.stages for path in stage):
        layer.get_submodule(path).register_forward_hook(partial(record, path))
    hidden = hidden.requires_grad_()
    dense.run(layer, position, hidden).backward(gradient)
    for stage in dense.stages:
        for path in stage:
            gradients = cast(Tensor, outputs[path].grad).flatten(0, -2)[kept[stage[0]]]
            # The squared error is O times its mean, and the isotropic estimate divides by O.
            squares = gradients.square().sum(-1).cpu() * scales[stage[0]] ** 2
            sample.costs[path] = squares / (2 * len(gradients))
            weight = layer.get_parameter(f"{path}.weight")
            chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:SAMPLED_ROWS]
            sample.rows[path] = weight[chosen.to(weight.device)].cpu()
    assert hidden.grad is not None
    return hidden.grad


class _Head:
    """Final norm and head of a dense model, in float32."""

    def __init__(self, checkpoint: DenseCheckpoint, dense: Layerwise):
        names = DenseNames(dense.config).unshared
        self.norm = dense._computed(copy.deepcopy(dense.family.norm)).requires_grad_(False)
        for name, _ in self.norm.named_parameters():
            weight = checkpoint.read(names[f"model.norm.{name}"])
            self.norm.get_parameter(name).data = weight.to(dense.device, torch.float32)
        weight = checkpoint.read(names.get("lm_head.weight", checkpoint.embedding_name))
        self.weight = weight.to(dense.device, torch.float32)
        self.softcap = getattr(dense.config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Log-probabilities ``[n, V]`` of the last hidden states ``[n, D]``."""
        logits = self.norm(hidden) @ self.weight.mT
        return (logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap).log_softmax(-1)

    def gradient_of_loss(self, hidden: Tensor, windows: Tensor) -> tuple[Tensor, float]:
        """Gradient of ``Σ −log p(sampled label)`` by the last hidden states ``[N, T, D]``, and the perplexity."""
        rows = hidden.flatten(0, 1).requires_grad_()
        targets = F.pad(windows[:, 1:], (0, 1), value=IGNORED).flatten().to(hidden.device)
        generator = torch.Generator().manual_seed(0)
        loss = 0.0
        for some, wanted in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logprobs = self(some)
            labels = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator).to(hidden.device)
            (-logprobs.gather(1, labels).sum()).backward()
            loss += float(F.nll_loss(logprobs.detach(), wanted, reduction="sum", ignore_index=IGNORED))
        assert rows.grad is not None
        return rows.grad.view_as(hidden), math.exp(loss / int((targets != IGNORED).sum()))
