"""Exit heads: what a recursive model says at the boundary after a recursion, and whether to stop there.

Shape legend: D hidden size, V vocabulary, r rank.

This file travels inside every checkpoint: it imports torch only.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ExitKind = Literal["shared", "norm", "low_rank", "full"]

EXIT_HEADS = ("shared", "norm", "low_rank", "full")
"""What an exit reads out with: the model's own final norm and LM head; a norm of its own; that, and a low-rank residual
on the LM head; a norm and a head of its own."""


class ExitHead(nn.Module):
    """The readout after one recursion, and the test that decides whether it is worth stopping there.

    ``logits = W n + B (A n)`` with ``n = norm(h)``: norm and ``W`` are the model's own final norm and LM head
    (Relaxed Recursive Transformers, arXiv 2410.20672, section 2.3) unless ``kind`` gives this exit its own.

    The test is one linear map from the hidden state at the boundary, scaled to unit root mean square, to the log-odds
    that this exit's first choice is also that of the last recursion. It costs ``D`` products; asking the distribution
    costs ``D·V``, on a small model as much as several layers.

    Args:
        kind: One of :data:`EXIT_HEADS`.
        norm: The model's final norm, of which a copy is taken where ``kind`` needs one.
        lm_head: The model's LM head, likewise.
        rank: ``r`` of a low-rank head.

    Parameters: ``test.weight [1, D]``, ``test.bias [1]``, and by kind those of ``norm``, ``lora_a [r, D]`` and
    ``lora_b [V, r]``, or of ``head``.
    """

    def __init__(self, kind: ExitKind, norm: nn.Module, lm_head: nn.Linear, rank: int):
        super().__init__()
        self.kind = kind
        vocabulary, width = lm_head.weight.shape
        like = lm_head.weight
        self.norm = None if kind == "shared" else copy.deepcopy(norm)
        self.head = _own_head(lm_head) if kind == "full" else None
        self.lora_a = nn.Parameter(like.new_empty(rank, width)) if kind == "low_rank" else None
        self.lora_b = nn.Parameter(like.new_empty(vocabulary, rank)) if kind == "low_rank" else None
        self.test = nn.Linear(width, 1, device=like.device, dtype=like.dtype)

    def forward(
        self, hidden_states: Tensor, norm: nn.Module, lm_head: nn.Module, vocabulary: int | None = None
    ) -> Tensor:
        """Logits ``[..., V]`` of ``[..., D]`` hidden states, given the model's own norm and head.

        With ``vocabulary``, those of its first so many entries.
        """
        normed = (self.norm or norm)(hidden_states)
        logits = read_vocabulary(self.head or lm_head, normed, vocabulary)
        if self.lora_a is not None and self.lora_b is not None:
            logits = logits + F.linear(F.linear(normed, self.lora_a), self.lora_b[:vocabulary])
        return logits

    def agreement(self, boundary_states: Tensor) -> Tensor:
        """Log-odds ``[...]`` that this exit and the last recursion agree, of ``[..., D]`` states at the boundary."""
        return self.test(F.rms_norm(boundary_states, boundary_states.shape[-1:])).squeeze(-1)

    @torch.no_grad()
    def copy_from(self, norm: nn.Module, lm_head: nn.Module) -> None:
        """Take the weights of the model's own norm and head where this exit has its own."""
        if self.norm is not None:
            self.norm.load_state_dict(norm.state_dict())
        if self.head is not None:
            self.head.load_state_dict(lm_head.state_dict())

    def extra_repr(self) -> str:
        return f"kind={self.kind}"


def read_vocabulary(head: nn.Module, normed: Tensor, vocabulary: int | None) -> Tensor:
    """What ``head`` says of ``normed [..., D]``: logits ``[..., V]``, or of the first ``vocabulary`` entries only.

    A head that is not torch's own (a quantized one) reads out all of them first.
    """
    if vocabulary is None:
        return head(normed)
    if type(head) is not nn.Linear:
        return head(normed)[..., :vocabulary]
    return F.linear(normed, head.weight[:vocabulary], None if head.bias is None else head.bias[:vocabulary])


def _own_head(lm_head: nn.Linear) -> nn.Linear:
    """A head shaped like the model's, its weights unset; not a deep copy, which would copy a tied embedding's data."""
    weight = lm_head.weight
    return nn.Linear(
        weight.shape[1], weight.shape[0], bias=lm_head.bias is not None, device=weight.device, dtype=weight.dtype
    )
