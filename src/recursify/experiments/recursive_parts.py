"""Parts of a recursive model, loaded one at a time: stored layers, embedding, final norm, head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_names import DenseNames

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class RecursiveParts:
    """Loader of the parts of one model, in float32 and eval mode.

    Args:
        names: Names of the model's parameters.
        read: Function from a parameter name of the recursive model to its tensor. Outside the shared block the tensors
            may be those of the dense model.
        device: Device of the parts.
    """

    def __init__(self, names: DenseNames, read: Callable[[str], Tensor], device: str = "cpu"):
        self.names = names
        self.read = read
        self.device = device

    def load(self, name: str) -> nn.Module:
        """Load the module ``name`` (``model.block.3`` for example), frozen."""
        skeleton = self.names.skeleton
        module = copy.deepcopy(skeleton.get_submodule(name)).to_empty(device=self.device)
        for inner in module.modules():  # buffers are not stored
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
        """Load the layer that runs at ``position``, bound to its depth, with the call signature of the model family."""
        ref = self.names.layout.layer_ref(position)
        layer = self.load(f"model.{ref.part}.{ref.index}")
        return partial(layer, depth=ref.depth) if ref.part == "block" else layer

    def logits_head(self) -> Callable[[Tensor], Tensor]:
        """Load final norm and head, as a function from hidden states ``[..., D]`` to logits ``[..., V]``."""
        norm, head = self.load(NORM), self.load(HEAD)
        softcap = getattr(self.names.skeleton.config, "final_logit_softcapping", None)

        def logits(hidden: Tensor) -> Tensor:
            raw = head(norm(hidden))
            return raw if softcap is None else torch.tanh(raw / softcap) * softcap

        return logits
