"""Training exits: each recursion but the last learns to say what the last one says, and when it will."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from recursify.errors import SettingsError
from recursify.modeling import (
    ExitHead,
    ExitKind,
    RecursiveConfig,
    RecursiveForCausalLM,
    RecursiveOutput,
)

from .data import IGNORED
from .losses import Sums, forward_kl, layer_distillation, weighted_coefficients
from .objectives import Heal, ReadExit

logger = logging.getLogger(__name__)


class Exits(Heal):
    """The last recursion as in :class:`Heal`, and beside it every exit.

    - ``aggressive``: ``L_last + Σ_d exit_weight · L_d`` (Relaxed Recursive Transformers, table J.1);
    - ``weighted``: ``Σ_i i/Σj · L_i`` over the exits and the last recursion;
    - ``free``: cross-entropies weighted by the layers that were run, ``Σ_i n_i CE_i / Σ_i n_i``, and hidden states
      of deep layers distilled into those before the exit (FREE, arXiv 2310.05424, which has one exit; of several, the
      mean). Where exits run the coda, it counts among their layers, and its own states teach nothing.

    ``L_d = CE_d + exit_kl_weight · KL(last ‖ d)`` with the last recursion's distribution detached. The exit test learns
    by cross-entropy whether its exit puts the same token first as the last recursion, on detached states.
    """

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Add exit heads; a model that has those asked for keeps them, and what is not asked for stays as it is.

        Raises:
            SettingsError: The layout has no boundaries, or an unknown kind of head.
        """
        settings, config = self.settings, model.config
        kind = cast(ExitKind, settings.exit_head or config.exit_head or "shared")
        rank = settings.exit_rank or config.exit_rank
        through_coda = config.exit_through_coda if settings.exit_through_coda is None else settings.exit_through_coda
        if model.exit_heads is not None:
            same_rank = kind != "low_rank" or rank == config.exit_rank
            if kind == config.exit_head and same_rank and through_coda == config.exit_through_coda:
                return
            logger.warning("The model's %s exit heads are replaced by new %s ones.", config.exit_head, kind)
        try:
            model.add_exit_heads(kind, rank=rank, through_coda=through_coda)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        distils = self.settings.exit_loss == "free" and self.settings.free_distillation is not None and model.training
        return {"exit_depths": model.config.exit_depths[: num_recursions - 1], "return_layer_states": distils}

    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        num_exits = len(outputs.exit_states or ())
        total, sums = super().__call__(model, outputs, inputs)
        if outputs.layer_states is not None and num_exits:
            distilled = self._distil(model, outputs.layer_states, num_exits, inputs["labels"])
            total = total + self.settings.free_distillation_weight * distilled
            sums["layer_distillation"] = distilled.detach()
        return total, sums

    def coefficients(self, config: RecursiveConfig, num_exits: int) -> list[float]:
        if self.settings.exit_loss == "aggressive":
            return [self.settings.exit_weight] * num_exits + [1.0]
        if self.settings.exit_loss == "weighted":
            return weighted_coefficients(num_exits + 1)
        layout = config.layout
        coda = layout.num_coda_layers if config.exit_through_coda else 0
        # A step with fewer recursions than the model has is shorter by whole blocks.
        skipped = (layout.num_recursions - 1 - num_exits) * layout.block_size
        layers = [layout.layers_before(depth) + coda for depth in range(num_exits)] + [layout.num_layers - skipped]
        return [count / sum(layers) for count in layers]

    def exit_loss(
        self, model: RecursiveForCausalLM, read: ReadExit, last: Tensor, coefficient: float
    ) -> tuple[Tensor, Sums]:
        settings = self.settings
        total = read.cross_entropy
        if settings.exit_kl_weight and settings.exit_loss != "free":
            total = total + settings.exit_kl_weight * forward_kl(read.logits, last, backend=settings.loss_backend)
        assert model.exit_heads is not None
        head = model.exit_heads[read.depth]
        assert isinstance(head, ExitHead)
        odds = head.agreement(read.boundary).float()
        test = F.binary_cross_entropy_with_logits(odds, read.agrees, reduction="sum")
        right = ((odds > 0) == (read.agrees > 0)).float().sum()
        return coefficient * total + settings.test_weight * test, {"test_loss": test, "test_accuracy": right}

    def _distil(
        self, model: RecursiveForCausalLM, layer_states: tuple[Tensor, ...], num_exits: int, labels: Tensor
    ) -> Tensor:
        keep = labels[:, 1:] != IGNORED
        layout = model.config.layout
        if model.config.exit_through_coda:
            # The coda follows an exit as it follows the last recursion, so what it makes of either is no teacher.
            layer_states = layer_states[: len(layer_states) - layout.num_coda_layers]
        normed = [model.model.norm(state[:, :-1][keep]) for state in layer_states]
        kind = self.settings.free_distillation
        assert kind is not None
        parts = [layer_distillation(normed, layout.layers_before(depth), kind) for depth in range(num_exits)]
        return torch.stack(parts).mean()
