"""What a stage minimizes: from the model's hidden states to a loss, and to figures per token.

An objective is called inside the model's forward (``RecursiveForCausalLM.forward(objective=…)``), where sharded weights
are whole, and may therefore read out hidden states chunk by chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recursify.modeling import RecursiveConfig, RecursiveForCausalLM, RecursiveOutput

from .data import IGNORED
from .losses import Sums, chunked_loss, cross_entropy, forward_kl
from .settings import UptrainSettings


class Objective(ABC):
    """Makes a loss of one micro-batch, and the changes to a model that its stage needs.

    Args:
        settings: The stage's settings.
        teacher: The dense model, frozen, or None where the settings do without.

    Attributes:
        needs_teacher: Whether the stage needs the dense model also where no loss does (``kl_weight`` 0).
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, settings: UptrainSettings, teacher: PreTrainedModel | None):
        self.settings = settings
        self.teacher = teacher

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Change a freshly loaded model before it is trained, in place; also before a checkpoint is read into it."""

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        """Further arguments of the model's forward in a step that runs ``num_recursions``."""
        return {}

    def begin_step(self, step: int, max_steps: int) -> None:
        """Take note of the step (0-based, of ``max_steps``) that follows; called before each of its micro-batches.

        What is set here has to follow from settings and step alone, so that all ranks and a resumed run agree, and
        stays as it is until the step is done, so that recomputed activations are what they were.
        """

    def settle(self, model: RecursiveForCausalLM, sequences: Callable[[int], list[Tensor]]) -> bool:
        """Choose what is chosen when the weights stand, before the last measurement; whether there was such a thing.

        Args:
            model: Trained, in eval mode. All ranks call this with the same text.
            sequences: Makes token ids ``[1, T]`` of the training text, so many tokens at least if it has them.
        """
        return False

    def finish(self, model: RecursiveForCausalLM) -> None:
        """Change a trained model before it is written, in place."""

    @abstractmethod
    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """The loss summed over predicted tokens, and summed figures, ``tokens`` among them."""


@dataclass(frozen=True)
class ReadExit:
    """One exit's reading of ``n`` tokens.

    Attributes:
        depth: The exit's depth.
        boundary: The hidden states ``[n, D]`` at the boundary that the exit test sees, detached.
        logits: ``[n, V]``.
        cross_entropy: Summed over the tokens.
        agrees: Per token 1 where the exit and the last recursion put the same word first, else 0; float32 ``[n]``.
    """

    depth: int
    boundary: Tensor
    logits: Tensor
    cross_entropy: Tensor
    agrees: Tensor


class Heal(Objective):
    """Cross-entropy plus forward KL from the dense teacher, on the last recursion.

    When measuring, every exit depth is read out too: a model without exit heads by its own norm and head.
    """

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        return {} if model.training else {"exit_depths": model.config.exit_depths[: num_recursions - 1]}

    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        keep = inputs["labels"][:, 1:] != IGNORED
        targets = inputs["labels"][:, 1:][keep]
        hidden = outputs.last_hidden_state[:, :-1][keep]
        taught = self._taught(model, inputs, keep)
        exits = [state[:, :-1][keep] for state in outputs.exit_states or ()]
        boundaries = [state[:, :-1][keep].detach() for state in outputs.boundary_states or ()]

        coefficients = self.coefficients(model.config, len(exits))

        def loss(pieces: list[Tensor], rows: slice) -> tuple[Tensor, Sums]:
            logits = model.compute_logits(pieces[0])
            total, figures = self._last(logits, targets[rows], None if taught is None else taught[rows], model.training)
            total = coefficients[-1] * total
            for depth, coefficient in enumerate(coefficients[:-1]):
                said = model.compute_exit_logits(depth, pieces[1 + depth])
                ce = cross_entropy(said, targets[rows], self.settings.loss_backend)
                read = ReadExit(depth, pieces[1 + len(exits) + depth], said, ce, same_choice(said, logits))
                added, more = self.exit_loss(model, read, logits, coefficient)
                total = total + added
                more |= {"ce": ce, "agreement": read.agrees.sum()}
                figures |= {f"{name}_depth_{depth}": figure for name, figure in more.items()}
            return total, figures

        return chunked_loss([hidden, *exits, *boundaries], logits_weights(model), loss, self.settings.loss_chunk)

    def _taught(self, model: RecursiveForCausalLM, inputs: dict[str, Tensor], keep: Tensor) -> Tensor | None:
        """The teacher's last hidden states ``[n, D]`` of the tokens to ``keep``, where they can change anything."""
        if self.teacher is None or (model.training and self.settings.trainable == "heads"):
            return None
        hidden = last_hidden_state(self.teacher, inputs)[:, :-1]
        return hidden[keep.to(hidden.device)]

    def coefficients(self, config: RecursiveConfig, num_exits: int) -> list[float]:
        """Of the losses of ``num_exits`` exits by depth, and of the last recursion's."""
        return [0.0] * num_exits + [1.0]

    def _last(self, logits: Tensor, targets: Tensor, taught: Tensor | None, training: bool) -> tuple[Tensor, Sums]:
        """Loss and figures of the last recursion, of ``[n, V]`` logits and the teacher's ``[n, D]`` hidden states."""
        settings = self.settings
        ce = cross_entropy(logits, targets, settings.loss_backend)
        total = settings.ce_weight * ce
        figures: Sums = {"ce": ce, "tokens": torch.ones_like(ce) * len(logits)}
        if taught is not None and self.teacher is not None:
            theirs = dense_logits(self.teacher, taught).to(logits.device)
            kl = forward_kl(logits, theirs, settings.temperature, settings.loss_backend)
            total = total + settings.kl_weight * kl
            if not training:
                figures["dense_ce"] = cross_entropy(theirs, targets, settings.loss_backend)
            figures |= {"kl": kl, "agreement": same_choice(logits, theirs).sum()}
        return total, figures

    def exit_loss(
        self, model: RecursiveForCausalLM, read: ReadExit, last: Tensor, coefficient: float
    ) -> tuple[Tensor, Sums]:
        """What an exit adds to the loss, and its further figures: here nothing, exits are only measured.

        Args:
            model: The model.
            read: What the exit says.
            last: Logits ``[n, V]`` of the last recursion.
            coefficient: The exit's, of :meth:`coefficients`.
        """
        return torch.zeros_like(read.cross_entropy), {}


def logits_weights(model: RecursiveForCausalLM) -> list[nn.Parameter]:
    """Every parameter that a readout, at the end or at an exit, may use."""
    parts = [model.lm_head, model.model.norm, *([] if model.exit_heads is None else [model.exit_heads])]
    return [parameter for part in parts for parameter in part.parameters()]


def same_choice(logits: Tensor, others: Tensor) -> Tensor:
    """Per token 1 where both ``[N, V]`` logits put the same word first, else 0; float32 ``[N]``."""
    return (logits.argmax(-1) == others.argmax(-1)).float()


@torch.no_grad()
def last_hidden_state(teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Normed hidden states ``[B, T, D]`` of a dense model, on its own device."""
    device = teacher.device
    named = {key: inputs[key].to(device) for key in ("input_ids", "position_ids")}
    return teacher.base_model(**named, use_cache=False).last_hidden_state


@torch.no_grad()
def dense_logits(teacher: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[N, V]`` of a dense model's normed hidden states ``[N, D]``."""
    head: Any = teacher.get_output_embeddings()
    logits = head(hidden)
    softcap = getattr(teacher.config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
