"""Stage ``heal``: cross-entropy and distillation from the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recursify.errors import SettingsError
from recursify.modeling import RecursiveConfig, RecursiveForCausalLM, RecursiveOutput

from .data import IGNORED
from .end_to_end import EndToEndStage
from .losses import (
    Sums,
    chunked_loss,
    cross_entropy,
    dense_logits,
    forward_kl,
    last_hidden_state,
    logits_parameters,
    same_top1,
)
from .settings import UptrainSettings


@dataclass(frozen=True)
class ExitOutput:
    """Output of one exit for ``n`` tokens.

    Attributes:
        depth: Depth of the exit.
        boundary: Hidden states ``[n, D]`` that the exit test reads, detached.
        logits: Logits ``[n, V]`` of the exit.
        cross_entropy: Cross-entropy, summed over the tokens.
        agrees: 1 for each token where exit and last recursion have the same argmax, else 0; float32 ``[n]``.
    """

    depth: int
    boundary: Tensor
    logits: Tensor
    cross_entropy: Tensor
    agrees: Tensor


class Heal(EndToEndStage):
    """Cross-entropy plus forward KL from the dense teacher, on the last recursion.

    Evaluations also measure every exit depth; a model without exit heads uses its own norm and head there.
    """

    supports_routing = True

    @classmethod
    def check_settings(cls, settings: UptrainSettings) -> None:
        if settings.ce_weight == settings.kl_weight == 0:
            raise SettingsError("ce_weight and kl_weight are both 0, so there is nothing to learn. Raise one of them.")

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        return {} if model.training else {"exit_depths": model.config.exit_depths[: num_recursions - 1]}

    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        keep = inputs["labels"][:, 1:] != IGNORED
        targets = inputs["labels"][:, 1:][keep]
        hidden = outputs.last_hidden_state[:, :-1][keep]
        teacher_states = self._teacher_states(model, inputs, keep)
        exits = [state[:, :-1][keep] for state in outputs.exit_states or ()]
        boundaries = [state[:, :-1][keep].detach() for state in outputs.boundary_states or ()]
        coefficients = self.coefficients(model.config, len(exits))

        def loss(chunks: list[Tensor], rows: slice) -> tuple[Tensor, Sums]:
            logits = model.compute_logits(chunks[0])
            taught = None if teacher_states is None else teacher_states[rows]
            total, figures = self._last_loss(logits, targets[rows], taught, model.training)
            total = coefficients[-1] * total
            for depth, coefficient in enumerate(coefficients[:-1]):
                exit_logits = model.compute_exit_logits(depth, chunks[1 + depth])
                ce = cross_entropy(exit_logits, targets[rows], self.settings.loss_backend)
                boundary = chunks[1 + len(exits) + depth]
                output = ExitOutput(depth, boundary, exit_logits, ce, same_top1(exit_logits, logits))
                exit_total, exit_figures = self.exit_loss(model, output, logits, coefficient)
                total = total + exit_total
                exit_figures |= {"ce": ce, "agreement": output.agrees.sum()}
                figures |= {f"{name}_depth_{depth}": figure for name, figure in exit_figures.items()}
            return total, figures

        return chunked_loss([hidden, *exits, *boundaries], logits_parameters(model), loss, self.settings.loss_chunk)

    def _teacher_states(self, model: RecursiveForCausalLM, inputs: dict[str, Tensor], keep: Tensor) -> Tensor | None:
        """The teacher's last hidden states ``[n, D]`` of the tokens in ``keep``; None where no loss needs them."""
        if self.teacher is None or (model.training and self.settings.trainable == "heads"):
            return None
        hidden = last_hidden_state(self.teacher, inputs)[:, :-1]
        return hidden[keep.to(hidden.device)]

    def coefficients(self, config: RecursiveConfig, num_exits: int) -> list[float]:
        """Coefficients of the losses of ``num_exits`` exits, by depth, and of the last recursion."""
        return [0.0] * num_exits + [1.0]

    def _last_loss(
        self, logits: Tensor, targets: Tensor, teacher_states: Tensor | None, training: bool
    ) -> tuple[Tensor, Sums]:
        """Loss and figures of the last recursion, from logits ``[n, V]`` and the teacher's states ``[n, D]``."""
        settings = self.settings
        ce = cross_entropy(logits, targets, settings.loss_backend)
        total = settings.ce_weight * ce
        figures: Sums = {"ce": ce, "tokens": torch.ones_like(ce) * len(logits)}
        if teacher_states is not None and self.teacher is not None:
            teacher_logits = dense_logits(self.teacher, teacher_states).to(logits.device)
            kl = forward_kl(logits, teacher_logits, settings.temperature, settings.loss_backend)
            total = total + settings.kl_weight * kl
            if not training:
                figures["dense_ce"] = cross_entropy(teacher_logits, targets, settings.loss_backend)
            figures |= {"kl": kl, "agreement": same_top1(logits, teacher_logits).sum()}
        return total, figures

    def exit_loss(
        self, model: RecursiveForCausalLM, output: ExitOutput, last_logits: Tensor, coefficient: float
    ) -> tuple[Tensor, Sums]:
        """The summed loss of an exit, and further figures. Here 0: exits are measured only.

        Args:
            model: The model.
            output: Output of the exit.
            last_logits: Logits ``[n, V]`` of the last recursion.
            coefficient: Coefficient of the exit, from :meth:`coefficients`.
        """
        return torch.zeros_like(output.cross_entropy), {}
