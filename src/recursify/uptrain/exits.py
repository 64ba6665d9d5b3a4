"""Stage ``exits``: train exit heads to match the last recursion, and exit tests to predict when they do."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from recursify.errors import SettingsError
from recursify.modeling import ExitHead, ExitKind, RecursiveConfig, RecursiveForCausalLM, RecursiveOutput

from .data import IGNORED
from .heal import ExitOutput, Heal
from .losses import Sums, forward_kl, layer_distillation, weighted_coefficients
from .settings import UptrainSettings

logger = logging.getLogger(__name__)


class Exits(Heal):
    """The loss of :class:`Heal` on the last recursion, and the losses of all exits.

    - ``aggressive``: ``L_last + Σ_d exit_weight · L_d`` (Relaxed Recursive Transformers, table J.1);
    - ``weighted``: ``Σ_i i/Σj · L_i`` over the exits and the last recursion;
    - ``free``: cross-entropies weighted by the number of layers run, ``Σ_i n_i CE_i / Σ_i n_i``, and distillation of
      deep layers' hidden states into those before the exit (FREE, arXiv 2310.05424; it has one exit, of several we take
      the mean). If exits run the coda, it counts among their layers, and its own states are not distilled.

    ``L_d = CE_d + exit_kl_weight · KL(last ‖ d)`` with the last recursion's distribution detached. The exit test is
    trained by cross-entropy, on detached states, to predict whether exit and last recursion have the same argmax.
    """

    supports_routing = False
    trained_parts = frozenset({"heads"})

    @classmethod
    def check_settings(cls, settings: UptrainSettings) -> None:
        """Accept all settings: with both weights of the last recursion at 0, exits still learn."""

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Add exit heads, unless the model has heads like these; settings that are None keep the model's value.

        Raises:
            SettingsError: The layout has no boundaries, or the kind of head is unknown.
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
            distillation = self._layer_distillation(model, outputs.layer_states, num_exits, inputs["labels"])
            total = total + self.settings.free_distillation_weight * distillation
            sums["layer_distillation"] = distillation.detach()
        return total, sums

    def coefficients(self, config: RecursiveConfig, num_exits: int) -> list[float]:
        if self.settings.exit_loss == "aggressive":
            return [self.settings.exit_weight] * num_exits + [1.0]
        if self.settings.exit_loss == "weighted":
            return weighted_coefficients(num_exits + 1)
        layout = config.layout
        coda = layout.num_coda_layers if config.exit_through_coda else 0
        # A step may run fewer recursions than the model has.
        skipped = (layout.num_recursions - 1 - num_exits) * layout.block_size
        layers = [layout.layers_before(depth) + coda for depth in range(num_exits)] + [layout.num_layers - skipped]
        return [count / sum(layers) for count in layers]

    def exit_loss(
        self, model: RecursiveForCausalLM, output: ExitOutput, last_logits: Tensor, coefficient: float
    ) -> tuple[Tensor, Sums]:
        settings = self.settings
        total = output.cross_entropy
        if settings.exit_kl_weight and settings.exit_loss != "free":
            kl = forward_kl(output.logits, last_logits, backend=settings.loss_backend)
            total = total + settings.exit_kl_weight * kl
        assert model.exit_heads is not None
        head = model.exit_heads[output.depth]
        assert isinstance(head, ExitHead)
        log_odds = head.agreement(output.boundary).float()
        test_loss = F.binary_cross_entropy_with_logits(log_odds, output.agrees, reduction="sum")
        num_correct = ((log_odds > 0) == (output.agrees > 0)).float().sum()
        total = coefficient * total + settings.test_weight * test_loss
        return total, {"test_loss": test_loss, "test_accuracy": num_correct}

    def _layer_distillation(
        self, model: RecursiveForCausalLM, layer_states: tuple[Tensor, ...], num_exits: int, labels: Tensor
    ) -> Tensor:
        keep = labels[:, 1:] != IGNORED
        layout = model.config.layout
        if model.config.exit_through_coda:
            # The coda runs after exits too, so its states are not deeper than those of an exit.
            layer_states = layer_states[: len(layer_states) - layout.num_coda_layers]
        normed = [model.model.norm(state[:, :-1][keep]) for state in layer_states]
        kind = self.settings.free_distillation
        assert kind is not None
        losses = [layer_distillation(normed, layout.layers_before(depth), kind) for depth in range(num_exits)]
        return torch.stack(losses).mean()
