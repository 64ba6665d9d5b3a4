"""A recursive model's parts, each loaded by itself: a stored layer, the embedding, the final norm, the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_names import DenseNames

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class RecursiveParts:
    """The parts of one model, read when they are asked for, in float32 and in eval mode.

    Args:
        names: Of the model's config.
        read: Gives the tensor of a recursive parameter name. What lies outside the shared block may as well be the
            dense model's.
        device: Where parts go.
    """

    def __init__(self, names: DenseNames, read: Callable[[str], Tensor], device: str = "cpu"):
        self.names = names
        self.read = read
        self.device = device

    def load(self, name: str) -> nn.Module:
        """The module ``name`` (``model.block.3``), frozen."""
        skeleton = self.names.skeleton
        module = copy.deepcopy(skeleton.get_submodule(name)).to_empty(device=self.device)
        for inner in module.modules():  # buffers are computed, not stored
            if any(True for _ in inner.buffers(recurse=False)):
                skeleton._init_weights(inner)
        state = {}
        for parameter, _ in module.named_parameters():
            full = f"{name}.{parameter}"
            if name == HEAD and full not in self.names.parameters:  # tied
                full = f"{EMBEDDING}.{parameter}"
            state[parameter] = self.read(full).to(self.device, torch.float32)
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()

    def layer(self, position: int) -> Callable[..., Tensor]:
        """The layer that runs at ``position``, at its depth, called as the family's own."""
        slot = self.names.layout.layer_ref(position)
        layer = self.load(f"model.{slot.part}.{slot.index}")
        return partial(layer, depth=slot.depth) if slot.part == "block" else layer

    def compute_logits(self) -> Callable[[Tensor], Tensor]:
        """From last hidden states ``[..., D]``, before the norm, to logits ``[..., V]``."""
        norm, head = self.load(NORM), self.load(HEAD)
        softcap = getattr(self.names.skeleton.config, "final_logit_softcapping", None)

        def logits(hidden: Tensor) -> Tensor:
            plain = head(norm(hidden))
            return plain if softcap is None else torch.tanh(plain / softcap) * softcap

        return logits
