"""The interface between the trainer and a loss, with the tensors that losses share.

An objective is called inside the model's forward (``RecursiveForCausalLM.forward(objective=…)``), where sharded weights
are gathered, and can therefore compute logits chunk by chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recursify.modeling import RecursiveForCausalLM, RecursiveOutput

from .losses import Sums
from .settings import UptrainSettings


class Objective(ABC):
    """The loss of a micro-batch, and the changes to the model that go with it.

    Args:
        settings: Settings of the stage.
        teacher: The dense model, frozen; None where the settings need none.
    """

    def __init__(self, settings: UptrainSettings, teacher: PreTrainedModel | None):
        self.settings = settings
        self.teacher = teacher

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Change a freshly loaded model in place, before it is trained or a checkpoint is loaded into it."""

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        """Additional arguments of the model's forward, for a step that runs ``num_recursions`` recursions."""
        return {}

    def begin_step(self, step: int, max_steps: int) -> None:
        """Set the state for the next step; called before each of its micro-batches.

        The state must depend on settings and step only, so that all ranks and a resumed run agree, and must not change
        during the step, so that recomputed activations are the same.

        Args:
            step: Index of the step, from 0.
            max_steps: Number of steps of the run.
        """

    def calibrate(self, model: RecursiveForCausalLM, sequences: Callable[[int], list[Tensor]]) -> bool:
        """Calibrate the trained model before the last evaluation, and return whether anything changed.

        Args:
            model: The trained model, in eval mode. All ranks call this with the same text.
            sequences: Function from a number of tokens to training sequences ``[1, T]`` with at least that many.
        """
        return False

    def finish(self, model: RecursiveForCausalLM) -> None:
        """Change the trained model in place before it is written."""

    @abstractmethod
    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """The loss summed over predicted tokens, and summed figures, ``tokens`` among them."""


def logits_parameters(model: RecursiveForCausalLM) -> list[nn.Parameter]:
    """All parameters that logits may depend on, at the end or at an exit."""
    parts = [model.lm_head, model.model.norm, *([] if model.exit_heads is None else [model.exit_heads])]
    return [parameter for part in parts for parameter in part.parameters()]


def same_top1(logits: Tensor, others: Tensor) -> Tensor:
    """1 for each token where both ``[N, V]`` logits have the same argmax, else 0; float32 ``[N]``."""
    return (logits.argmax(-1) == others.argmax(-1)).float()


@torch.no_grad()
def last_hidden_state(teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Normed hidden states ``[B, T, D]`` of a dense model, on its own device."""
    device = teacher.device
    arguments = {key: inputs[key].to(device) for key in ("input_ids", "position_ids")}
    return teacher.base_model(**arguments, use_cache=False).last_hidden_state


@torch.no_grad()
def dense_logits(teacher: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[N, V]`` of a dense model's normed hidden states ``[N, D]``."""
    head: Any = teacher.get_output_embeddings()
    logits = head(hidden)
    softcap = getattr(teacher.config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
