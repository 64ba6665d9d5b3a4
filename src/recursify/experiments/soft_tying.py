"""Soft tying: start from the untied dense layers of every slot, and let their weights become one while they train.

Majority Kernels (arXiv 2402.05033) trains several kernels in the place of one, runs every step with a random convex
combination of them, and keeps their mean. Here the kernels of a slot are the dense layers tied in it. For a linear map
with dense weights ``W_d``, residuals ``B_d A_d`` and shared weight ``W`` in the folder, the trained candidates are

    C_d = W_d − B_d A_d + Δ        Δ = W − mean_d(W_d − B_d A_d)        so that  mean_d C_d = W

and depth ``d`` of a step runs with the weight ``Σ_e α[d,e] C_e − (1 − t) Δ`` (plus its residual, which is trained as
always). ``t`` goes from 0 to 1 over ``tie_fraction`` of the steps, and on average ``α[d] = (1 − t) onehot(d) + t / R``:

* At the start every depth is the dense layer, exactly. (Norms, biases and the unshared layers are those of the folder,
  which are the dense model's own unless it has been trained, or converted with ``tie_norms``.)
* At the end all depths run the mean of the candidates, which is what is written. Had nothing been trained, that would
  be the folder's own shared weight: the way leads from the dense model to the converted one, not to the plain mean of
  the weights, with which calibrated residuals have nothing to do (``Δ`` is 0 for ``average`` with ``zero``).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from recursify.checkpoint.dense_names import DenseNames
from recursify.errors import CheckpointError
from recursify.modeling import RecursiveForCausalLM, RelaxedLinear, SharedLayer
from recursify.uptrain.objectives import Heal
from recursify.uptrain.settings import UptrainSettings


@dataclass
class Mixture:
    """How the candidates of every slot are mixed in the current step; one object that all linear maps look at.

    Mutable, unlike a depth: it is the same in all calls of a step, those that recompute activations included.

    Attributes:
        weights: ``[R][R]``, by depth and candidate, each row convex; None for the mean.
        apart: ``1 − t``: how much of the offset is still subtracted.
    """

    weights: list[list[float]] | None = None
    apart: float = 0.0


def tied_share(settings: UptrainSettings, step: int, max_steps: int) -> float:
    """``t``: how far the depths have come to the mean at the 0-based ``step``; 1 from ``tie_fraction`` on."""
    steps = math.floor(settings.tie_fraction * max_steps)
    return 1.0 if step >= steps else step / steps


def draw_mixture(settings: UptrainSettings, num_recursions: int, step: int, max_steps: int) -> Mixture:
    """The mixture of a step, from seed and step alone, so that all ranks and a resumed run draw the same.

    Depth ``d`` has ``m = (1 − t) onehot(d) + t / R`` on average, and ``α = (1 − s) m + s · Dirichlet(R m)`` with
    ``s = tie_noise · (1 − t)``: convex, with mean ``m`` and variance ``s² m (1 − m) / (R + 1)``, which is 0 at the
    one-hot start and at the mean. The Dirichlet distribution would be flat at the mean.
    """
    share = tied_share(settings, step, max_steps)
    if share == 1:
        return Mixture()
    generator = random.Random(f"{settings.seed}:{step}:mixture")
    spread = settings.tie_noise * (1 - share)
    weights = []
    for depth in range(num_recursions):
        mean = [share / num_recursions + (1 - share) * (other == depth) for other in range(num_recursions)]
        # A Dirichlet draw is gamma draws over their sum. The depth's own shape is at least 1, so the sum is not 0.
        draws = [generator.gammavariate(num_recursions * m, 1.0) if m else 0.0 for m in mean]
        weights.append([(1 - spread) * m + spread * draw / sum(draws) for m, draw in zip(mean, draws, strict=True)])
    return Mixture(weights, 1 - share)


class Candidates(nn.Module):
    """The weights of one slot while they are still several; stands where the shared ``nn.Linear`` stood.

    Parameters: ``weight [R, O, I]``, under the name of the shared weight, and trained as such. The offset ``Δ [O, I]``
    is a buffer that checkpoints do not hold: it is made again from the folder and the dense model.
    """

    offset: Tensor

    def __init__(self, weight: Tensor, offset: Tensor, mixture: Mixture):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("offset", offset, persistent=False)
        self.mixture = mixture

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """``[..., I] -> [..., O]`` with the weight of ``depth``."""
        return F.linear(x, self.mixed(depth))

    def mixed(self, depth: int) -> Tensor:
        """The weight ``[O, I]`` of ``depth`` in the current step; in evaluation the mean, which is what is written."""
        if self.mixture.weights is None or not self.training:
            return self.weight.mean(0)
        # Not a matrix product, which would be in bfloat16 under autocast.
        mixed = -self.mixture.apart * self.offset
        for share, candidate in zip(self.mixture.weights[depth], self.weight, strict=True):
            mixed = torch.add(mixed, candidate, alpha=share)
        return mixed


class SoftTiedLinear(RelaxedLinear):
    """A :class:`RelaxedLinear` whose depths do not share their weight yet."""

    linear: Candidates  # type: ignore[assignment]

    def __init__(self, relaxed: RelaxedLinear, dense: list[Tensor], mixture: Mixture):
        """Untie ``relaxed``, whose residuals and biases it takes over.

        Args:
            relaxed: The linear map to stand in for.
            dense: The dense weight ``[O, I]`` of every depth.
            mixture: Of the current step.
        """
        nn.Module.__init__(self)
        shared = relaxed.linear.weight.detach()
        weight = torch.stack([w.to(shared.device, shared.dtype) for w in dense])
        if relaxed.lora_a is not None and relaxed.lora_b is not None:
            weight -= relaxed.lora_b.detach() @ relaxed.lora_a.detach()
        offset = shared - weight.mean(0)
        self.linear = Candidates(weight + offset, offset, mixture)
        self.rank, self.lora_a, self.lora_b, self.bias = relaxed.rank, relaxed.lora_a, relaxed.lora_b, relaxed.bias

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """``[..., I] -> [..., O]`` at ``depth``, with its mixture of the current step."""
        return self.relax(self.linear(x, depth), x, depth)

    def merged_weight(self, depth: int) -> Tensor:
        """What a dense layer would hold at ``depth`` if the candidates were collapsed now."""
        return self.collapsed().merged_weight(depth)

    def collapsed(self) -> RelaxedLinear:
        """The ordinary linear map with the mean of the candidates, and the same residuals and biases."""
        num_depths, out_features, in_features = self.linear.weight.shape
        with torch.device("meta"):
            relaxed = RelaxedLinear(in_features, out_features, num_depths=num_depths, rank=self.rank)
        relaxed.linear.weight = nn.Parameter(self.linear.weight.detach().mean(0))
        relaxed.lora_a, relaxed.lora_b, relaxed.bias = self.lora_a, self.lora_b, self.bias
        return relaxed.train(self.training)


class SoftTying(Heal):
    """Heals while the depths of every slot go from the dense layers' weights to one; see the module.

    It holds as many weights as the dense model, and gradients and moments of as many, until :meth:`finish`.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(self, settings: UptrainSettings, teacher: PreTrainedModel | None):
        super().__init__(settings, teacher)
        self.mixture = Mixture()
        self.num_recursions = 0

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Untie the linear maps of the shared block.

        Raises:
            CheckpointError: The teacher's layers are not those that are tied.
        """
        assert self.teacher is not None, "the stage needs it"
        names = DenseNames(model.config)
        dense = dict(self.teacher.named_parameters())
        self.num_recursions = model.config.layout.num_recursions
        for index, layer in enumerate(model.model.block):
            assert isinstance(layer, SharedLayer)
            for path, stored in list(layer.stored_modules()):
                if not isinstance(stored, RelaxedLinear):
                    continue
                needed = [names.dense(position, path, "weight") for position in names.layout.positions(index)]
                _check_dense(needed, dense, tuple(stored.linear.weight.shape))
                weights = [dense[name].detach() for name in needed]
                layer.replace_stored(path, SoftTiedLinear(stored, weights, self.mixture))
        # The offsets are constants, as large as the shared weights: nothing to send to all ranks with every step.
        offsets = [name for name, _ in model.named_buffers() if name.endswith(".linear.offset")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, offsets)
        if not self.settings.kl_weight:
            self.teacher = None

    def begin_step(self, step: int, max_steps: int) -> None:
        """Draw the step's mixture."""
        drawn = draw_mixture(self.settings, self.num_recursions, step, max_steps)
        self.mixture.weights, self.mixture.apart = drawn.weights, drawn.apart

    def finish(self, model: RecursiveForCausalLM) -> None:
        """Collapse every slot to the mean: an ordinary recursive model."""
        for layer in model.model.block:
            assert isinstance(layer, SharedLayer)
            for path, stored in list(layer.stored_modules()):
                if isinstance(stored, SoftTiedLinear):
                    layer.replace_stored(path, stored.collapsed())


def _check_dense(needed: list[str], dense: dict[str, nn.Parameter], shape: tuple[int, ...]) -> None:
    for name in needed:
        found = tuple(dense[name].shape) if name in dense else None
        if found != shape:
            raise CheckpointError(
                f"Stage tie starts from the dense layers' own weights, and the teacher's '{name}' is "
                f"{'not there' if found is None else list(found)}, where {list(shape)} is needed. Give the dense model "
                f"that the recursive one was made from (--teacher)."
            )
