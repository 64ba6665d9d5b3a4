"""Exit heads: logits after each recursion, and a classifier that estimates their agreement with the last recursion.

Shape legend: D hidden size, V vocabulary, r rank.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

ExitKind = Literal["shared", "norm", "low_rank", "full"]

EXIT_HEADS = ("shared", "norm", "low_rank", "full")
"""Kinds of exit heads: the model's own final norm and LM head; a norm of its own; that, and a low-rank residual on the
LM head; a norm and a head of its own."""

KV_MODES = ("deferred", "copied", "latest")
"""Sources of the keys and values of depths that a token skips. ``deferred``: computed exactly, together, when a later
token of the row needs them (FREE's synchronized parallel decoding). ``copied``: projected at once from the state at the
exit (CALM's state copying). ``latest``: those of the deepest depth that ran. The last two are approximate."""


class ExitHead(nn.Module):
    """Norm and LM head of the exit after one recursion, and the test that estimates its agreement with the last one.

    ``logits = W n + B (A n)`` with ``n = norm(h)``: norm and ``W`` are the model's own final norm and LM head
    (Relaxed Recursive Transformers, arXiv 2410.20672, section 2.3) unless ``kind`` gives this exit its own.

    The test is one linear map from the hidden state at the boundary, scaled to unit root mean square, to the log-odds
    that this exit and the last recursion have the same top-1 token. It costs ``D`` products; logits cost ``D·V``, on a
    small model as much as several layers.

    Args:
        kind: Kind of head, one of :data:`EXIT_HEADS`.
        norm: Final norm of the model, copied if ``kind`` needs one of its own.
        lm_head: LM head of the model, likewise.
        rank: Rank ``r`` of a low-rank head.

    Parameters: ``test.weight [1, D]``, ``test.bias [1]``, and by kind those of ``norm``, ``lora_a [r, D]`` and
    ``lora_b [V, r]``, or of ``head``.
    """

    def __init__(self, kind: ExitKind, norm: nn.Module, lm_head: nn.Linear, rank: int):
        super().__init__()
        self.kind = kind
        weight = lm_head.weight
        vocabulary, width = weight.shape
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.norm = None if kind == "shared" else copy.deepcopy(norm)
        # Not a deep copy, which would copy a tied embedding's data.
        self.head = nn.Linear(width, vocabulary, bias=lm_head.bias is not None, **like) if kind == "full" else None
        self.lora_a = nn.Parameter(torch.empty(rank, width, **like)) if kind == "low_rank" else None
        self.lora_b = nn.Parameter(torch.empty(vocabulary, rank, **like)) if kind == "low_rank" else None
        self.test = nn.Linear(width, 1, **like)

    def forward(
        self, hidden_states: Tensor, norm: nn.Module, lm_head: nn.Module, vocabulary: int | None = None
    ) -> Tensor:
        """Logits ``[..., V]`` of ``[..., D]`` hidden states, given the model's own norm and head.

        With ``vocabulary``, those of that number of first entries.
        """
        normed = (self.norm or norm)(hidden_states)
        logits = vocabulary_logits(self.head or lm_head, normed, vocabulary)
        if self.lora_a is not None and self.lora_b is not None:
            logits = logits + F.linear(F.linear(normed, self.lora_a), self.lora_b[:vocabulary])
        return logits

    def agreement(self, boundary_states: Tensor) -> Tensor:
        """Log-odds ``[...]`` that this exit and the last recursion agree, for ``[..., D]`` states at the boundary."""
        return self.test(F.rms_norm(boundary_states, boundary_states.shape[-1:])).squeeze(-1)

    @torch.no_grad()
    def copy_from(self, norm: nn.Module, lm_head: nn.Module) -> None:
        """Copy the weights of the model's norm and head to this exit's own."""
        if self.norm is not None:
            self.norm.load_state_dict(norm.state_dict())
        if self.head is not None:
            self.head.load_state_dict(lm_head.state_dict())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the residual to zero and the test to even odds."""
        init_residual(self.lora_a, self.lora_b)
        init.zeros_(self.test.weight)
        init.zeros_(self.test.bias)

    def extra_repr(self) -> str:
        return f"kind={self.kind}"


def vocabulary_logits(head: nn.Module, normed: Tensor, vocabulary: int | None) -> Tensor:
    """Logits ``[..., V]`` of ``normed [..., D]`` by ``head``, or of the first ``vocabulary`` entries only."""
    if vocabulary is None or type(head) is not nn.Linear:  # a quantized head computes all of them
        return head(normed)[..., :vocabulary]
    return F.linear(normed, head.weight[:vocabulary], None if head.bias is None else head.bias[:vocabulary])


def init_residual(lora_a: Tensor | None, lora_b: Tensor | None) -> None:
    """Initialize a low-rank residual to zero: A as the weight of ``nn.Linear``, B zero."""
    if lora_a is not None and lora_b is not None:
        bound = 1 / math.sqrt(lora_a.shape[-1])
        init.uniform_(lora_a, -bound, bound)
        init.zeros_(lora_b)
