"""Stage ``tie`` (soft tying): start from the untied dense layers and make their weights equal during training.

Majority Kernels (arXiv 2402.05033) trains several kernels in place of one, runs every step with a random convex
combination of them, and keeps their mean. Here the kernels are the dense layers of a tied group. For a linear map with
dense weights ``W_d``, residuals ``B_d A_d`` and the converted model's shared weight ``W``, the trained candidates are

    C_d = W_d − B_d A_d + Δ        Δ = W − mean_d(W_d − B_d A_d)        so that  mean_d C_d = W

and depth ``d`` runs with the weight ``Σ_e α[d,e] C_e − (1 − t) Δ`` (plus its residual, which is trained as well).
``t`` rises from 0 to 1 over ``tie_fraction`` of the steps, and the mean of ``α[d]`` is ``(1 − t) onehot(d) + t / R``:

* At the start every depth is exactly the dense layer. (Norms, biases and unshared layers are those of the converted
  model. They equal the dense model's unless it has been trained, or converted with ``tie_norms``.)
* At the end all depths run the mean of the candidates, which is written. Without training that is the converted model's
  shared weight, not the mean of the dense weights, which does not match calibrated residuals. (``Δ`` is 0 for
  initialization ``average`` with relaxation ``zero``.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from recursify.checkpoint.dense_names import DenseNames
from recursify.errors import CheckpointError, SettingsError
from recursify.modeling import RecursiveForCausalLM, RelaxedLinear, SharedLayer
from recursify.uptrain.heal import Heal
from recursify.uptrain.settings import UptrainSettings


@dataclass
class Mixture:
    """Mixture of the candidates in a step, also where it recomputes activations; one object for all linear maps.

    Attributes:
        weights: Convex weights ``[R][R]`` by depth and candidate; None for the mean.
        offset_scale: Fraction ``1 − t`` of the offset that is subtracted.
    """

    weights: list[list[float]] | None = None
    offset_scale: float = 0.0


def tied_fraction(settings: UptrainSettings, step: int, max_steps: int) -> float:
    """``t`` at the 0-based ``step``: 0 for untied depths, 1 for the mean (from ``tie_fraction`` of the steps on)."""
    steps = math.floor(settings.tie_fraction * max_steps)
    return 1.0 if step >= steps else step / steps


def draw_mixture(settings: UptrainSettings, num_recursions: int, step: int, max_steps: int) -> Mixture:
    """Draw the mixture of a step from seed and step only, so that all ranks and a resumed run draw the same.

    For depth ``d`` let ``m = (1 − t) onehot(d) + t / R``. Then ``α = (1 − s) m + s · Dirichlet(R m)`` with
    ``s = tie_noise · (1 − t)``: convex, with mean ``m`` and variance ``s² m (1 − m) / (R + 1)``, which is 0 at the
    one-hot start and at the mean (where a Dirichlet distribution alone would be flat).
    """
    t = tied_fraction(settings, step, max_steps)
    if t == 1:
        return Mixture()
    generator = random.Random(f"{settings.seed}:{step}:mixture")
    spread = settings.tie_noise * (1 - t)
    weights = []
    for depth in range(num_recursions):
        mean = [t / num_recursions + (1 - t) * (other == depth) for other in range(num_recursions)]
        # A Dirichlet sample is a gamma sample over its sum. The shape of this depth is at least 1, so the sum is not 0.
        draws = [generator.gammavariate(num_recursions * m, 1.0) if m else 0.0 for m in mean]
        weights.append([(1 - spread) * m + spread * draw / sum(draws) for m, draw in zip(mean, draws, strict=True)])
    return Mixture(weights, 1 - t)


class Candidates(nn.Module):
    """The candidates for one shared weight, in place of the shared ``nn.Linear``.

    The parameter ``weight [R, O, I]`` has the name of the shared weight and is trained like it. The offset ``Δ [O, I]``
    is a buffer that is not stored in checkpoints: it is recomputed from the source and the dense model.
    """

    offset: Tensor

    def __init__(self, weight: Tensor, offset: Tensor, mixture: Mixture):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("offset", offset, persistent=False)
        self.mixture = mixture

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """Apply the weight of ``depth``: ``[..., I] -> [..., O]``."""
        return F.linear(x, self.mixed(depth))

    def mixed(self, depth: int) -> Tensor:
        """The weight ``[O, I]`` of ``depth`` in the current step; in evaluations the mean, which will be written."""
        if self.mixture.weights is None or not self.training:
            return self.weight.mean(0)
        # A matrix product would run in bfloat16 under autocast.
        mixed = -self.mixture.offset_scale * self.offset
        for alpha, candidate in zip(self.mixture.weights[depth], self.weight, strict=True):
            mixed = torch.add(mixed, candidate, alpha=alpha)
        return mixed


class SoftTiedLinear(RelaxedLinear):
    """A :class:`RelaxedLinear` whose weight is not shared yet."""

    linear: Candidates  # type: ignore[assignment]

    def __init__(self, relaxed: RelaxedLinear, dense: list[Tensor], mixture: Mixture):
        """Untie ``relaxed`` into the ``dense`` weight ``[O, I]`` of every depth, and take over residuals and biases."""
        nn.Module.__init__(self)
        shared = relaxed.linear.weight.detach()
        weight = torch.stack([w.to(shared.device, shared.dtype) for w in dense])
        if relaxed.lora_a is not None and relaxed.lora_b is not None:
            weight -= relaxed.lora_b.detach() @ relaxed.lora_a.detach()
        offset = shared - weight.mean(0)
        self.linear = Candidates(weight + offset, offset, mixture)
        self.rank, self.lora_a, self.lora_b, self.bias = relaxed.rank, relaxed.lora_a, relaxed.lora_b, relaxed.bias

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """Apply the map at ``depth`` with the mixture of the current step: ``[..., I] -> [..., O]``."""
        return self.relax(self.linear(x, depth), x, depth)

    def merged_weight(self, depth: int) -> Tensor:
        """The weight of an equivalent dense layer at ``depth``, with the mean of the candidates."""
        return self.collapsed().merged_weight(depth)

    def collapsed(self) -> RelaxedLinear:
        """A :class:`RelaxedLinear` with the mean of the candidates and the same residuals and biases."""
        num_depths, out_features, in_features = self.linear.weight.shape
        with torch.device("meta"):
            relaxed = RelaxedLinear(in_features, out_features, num_depths=num_depths, rank=self.rank)
        relaxed.linear.weight = nn.Parameter(self.linear.weight.detach().mean(0))
        relaxed.lora_a, relaxed.lora_b, relaxed.bias = self.lora_a, self.lora_b, self.bias
        return relaxed.train(self.training)


class SoftTying(Heal):
    """Healing during which the weights of a tied group move from the dense layers' to one; see the module.

    Until :meth:`finish`, weights, gradients and optimizer state are as large as the dense model's.
    """

    needs_teacher = True
    supports_routing = False

    def __init__(self, settings: UptrainSettings, teacher: PreTrainedModel | None):
        super().__init__(settings, teacher)
        self.mixture = Mixture()
        self.num_recursions = 0

    @classmethod
    def check_settings(cls, settings: UptrainSettings) -> None:
        """Check that there is something to learn, and that the weights are not sharded."""
        super().check_settings(settings)
        if settings.sharding != "none":
            raise SettingsError(
                f"Stage '{settings.stage}' does not support sharding '{settings.sharding}'. Use sharding none."
            )

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Untie the linear maps of the shared block; a CheckpointError if the teacher's layers do not match."""
        assert self.teacher is not None, "needs_teacher is set"
        names = DenseNames(model.config)
        dense = dict(self.teacher.named_parameters())
        self.num_recursions = model.config.layout.num_recursions
        for index, layer, path, linear in _linears(model):
            group = [names.dense(position, path, "weight") for position in names.layout.positions(index)]
            _check_dense(group, dense, tuple(linear.linear.weight.shape))
            weights = [dense[name].detach() for name in group]
            layer.set_submodule(path, SoftTiedLinear(linear, weights, self.mixture))
        # The offsets are constant and as large as the shared weights, so DDP should not broadcast them every step.
        offsets = [name for name, _ in model.named_buffers() if name.endswith(".linear.offset")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, offsets)
        if not self.settings.kl_weight:
            self.teacher = None

    def begin_step(self, step: int, max_steps: int) -> None:
        """Draw the step's mixture."""
        drawn = draw_mixture(self.settings, self.num_recursions, step, max_steps)
        self.mixture.weights, self.mixture.offset_scale = drawn.weights, drawn.offset_scale

    def finish(self, model: RecursiveForCausalLM) -> None:
        """Replace the candidates by their mean, which makes an ordinary recursive model."""
        for _, layer, path, linear in _linears(model):
            assert isinstance(linear, SoftTiedLinear)
            layer.set_submodule(path, linear.collapsed())


def _linears(model: RecursiveForCausalLM) -> Iterator[tuple[int, SharedLayer, str, RelaxedLinear]]:
    """Shared linear maps, with the index of their layer, the layer, and their path in it."""
    for index, layer in enumerate(model.model.block):
        assert isinstance(layer, SharedLayer)
        for path, module in list(layer.stored_modules()):
            if isinstance(module, RelaxedLinear):
                yield index, layer, path, module


def _check_dense(group: list[str], dense: dict[str, nn.Parameter], shape: tuple[int, ...]) -> None:
    for name in group:
        actual = tuple(dense[name].shape) if name in dense else None
        if actual != shape:
            raise CheckpointError(
                f"Soft tying starts from the dense layers' weights: the teacher's '{name}' must be {list(shape)}, but "
                f"is {'missing' if actual is None else list(actual)}. Give the dense model that the recursive one was "
                f"made from (--teacher)."
            )
