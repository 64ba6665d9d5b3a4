"""What a stage minimizes: from the model's hidden states to a loss, and to figures per token.

An objective is called inside the model's forward (``RecursiveForCausalLM.forward(objective=…)``), where sharded weights
are whole, and may therefore read out hidden states chunk by chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from recursify.modeling import RecursiveForCausalLM

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

    def begin_step(self, step: int, max_steps: int) -> None:
        """Take note of the step (0-based, of ``max_steps``) that follows; called before each of its micro-batches.

        What is set here has to follow from settings and step alone, so that all ranks and a resumed run agree, and
        stays as it is until the step is done, so that recomputed activations are what they were.
        """

    def finish(self, model: RecursiveForCausalLM) -> None:
        """Change a trained model before it is written, in place."""

    @abstractmethod
    def __call__(
        self, model: RecursiveForCausalLM, outputs: BaseModelOutputWithPast, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """The loss summed over predicted tokens, and summed figures, ``tokens`` among them."""


class Heal(Objective):
    """Cross-entropy plus forward KL from the dense teacher."""

    def __call__(
        self, model: RecursiveForCausalLM, outputs: BaseModelOutputWithPast, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        settings = self.settings
        keep = inputs["labels"][:, 1:] != IGNORED
        targets = inputs["labels"][:, 1:][keep]
        hidden = outputs.last_hidden_state[:, :-1][keep]
        taught = None if self.teacher is None else last_hidden_state(self.teacher, inputs)[:, :-1][keep]

        def loss(pieces: list[Tensor], rows: slice) -> tuple[Tensor, Sums]:
            logits = model.read_out(pieces[0])
            ce = cross_entropy(logits, targets[rows])
            total = settings.ce_weight * ce
            figures: Sums = {"ce": ce, "tokens": torch.ones_like(ce) * len(logits)}
            if taught is not None and self.teacher is not None:
                theirs = dense_read_out(self.teacher, taught[rows]).to(logits.device)
                kl = forward_kl(logits, theirs, settings.temperature)
                total = total + settings.kl_weight * kl
                if not model.training:
                    figures["dense_ce"] = cross_entropy(theirs, targets[rows])
                figures |= {"kl": kl, "agreement": (logits.argmax(-1) == theirs.argmax(-1)).sum().float()}
            return total, figures

        return chunked_loss([hidden], list(model.lm_head.parameters()), loss, settings.loss_chunk)


@torch.no_grad()
def last_hidden_state(teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Normed hidden states ``[B, T, D]`` of a dense model, on its own device."""
    device = teacher.device
    named = {key: inputs[key].to(device) for key in ("input_ids", "position_ids")}
    return teacher.base_model(**named, use_cache=False).last_hidden_state


@torch.no_grad()
def dense_read_out(teacher: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[N, V]`` of a dense model's normed hidden states ``[N, D]``."""
    head: Any = teacher.get_output_embeddings()
    logits = head(hidden)
    softcap = getattr(teacher.config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
