"""Small recursive models that exit early, and how tests decode with them."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from helpers.tiny_models import random_ids, tiny_recursive
from recursify.modeling import RecursiveForCausalLM

STEPS = 64


def tiny_exits(
    family: str = "llama", recursions: int = 4, *, through_coda: bool = True, heads: bool = True
) -> RecursiveForCausalLM:
    """A random recursive model with exit heads that differ from its end and tests that disagree."""
    model = tiny_recursive(family, recursions)
    if heads:
        model.add_exit_heads("norm", through_coda=through_coda)
        with torch.no_grad():
            for head in model.exit_heads:
                head.test.weight.normal_(std=0.3)
    return model


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of those lengths, and their mask."""
    ids = random_ids(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def generate(model: RecursiveForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None, **more):
    arguments = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{**arguments, **more})


class Waits(TorchFunctionMode):
    """Counts what waits for a GPU: values fetched, and lists of the host that index or become tensors there."""

    FETCHES = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal")

    def __init__(self):
        super().__init__()
        self.fetched = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.fetched += name in self.FETCHES
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(each, list) for each in index), "a list as index is copied, and waited for"
        assert not (name == "tensor" and (kwargs or {}).get("device") is not None), "a copy that waits: use on_device"
        return function(*args, **(kwargs or {}))
