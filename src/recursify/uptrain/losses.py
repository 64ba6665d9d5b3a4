"""Losses of uptraining, and how they are computed without holding the logits of a whole batch.

All functions sum over tokens and leave the division to the caller, who knows how many tokens the whole step has on all
ranks and micro-batches.

Shape legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sums = dict[str, Tensor]
"""Figures summed over tokens, by name; none of them carries gradients."""

ChunkLoss = Callable[[list[Tensor], slice], tuple[Tensor, Sums]]
"""Given chunks ``[n, D]`` of the hidden states and which tokens they are, a summed loss and figures to report."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``Σ_n −log softmax(logits_n)[target_n]`` in nats, of ``[N, V]`` logits and ``[N]`` targets."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``T² Σ_n KL(teacher_n ‖ model_n)`` in nats, both distributions at temperature ``T``, of ``[N, V]`` logits.

    The factor ``T²`` keeps gradients of one size over temperatures (Hinton et al. 2015, section 2). The teacher's side
    gets no gradient.
    """
    mine = (logits.float() / temperature).log_softmax(-1)
    theirs = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return F.kl_div(mine, theirs, log_target=True, reduction="sum") * temperature**2


def chunked_loss(hidden: list[Tensor], weights: list[nn.Parameter], loss: ChunkLoss, chunk: int) -> tuple[Tensor, Sums]:
    """``loss`` summed over chunks of tokens, its gradients taken chunk by chunk in the forward pass.

    So the logits ``[N, V]`` are never whole, nor recomputed: what is kept for the backward pass has the size of
    ``hidden`` and of ``weights``.

    Args:
        hidden: Tensors ``[N, D]`` that ``loss`` reads, cut along N alike.
        weights: Parameters that ``loss`` reads; those that do not require gradients may be left in.
        loss: See :data:`ChunkLoss`.
        chunk: Tokens at a time.

    Returns:
        The loss, a float32 scalar that backpropagates into ``hidden`` and ``weights``, and the summed figures.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    sums: Sums = {}
    total = _ChunkedLoss.apply(loss, chunk, sums, len(hidden), *hidden, *trained)
    return total, sums


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: ChunkLoss, chunk: int, sums: Sums, count: int, *tensors: Tensor) -> Tensor:
        hidden, weights = tensors[:count], tensors[count:]
        differentiates = any(ctx.needs_input_grad)
        hidden_grads = [torch.zeros_like(h) if h.requires_grad else None for h in hidden]
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        total = torch.zeros((), dtype=torch.float32, device=hidden[0].device)
        for start in range(0, len(hidden[0]), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(differentiates):
                pieces = [h[rows].detach().requires_grad_(differentiates and h.requires_grad) for h in hidden]
                value, figures = loss(pieces, rows)
                if differentiates:
                    wanted = [piece for piece in pieces if piece.requires_grad]
                    grads = torch.autograd.grad(value, [*wanted, *weights], allow_unused=True)
            total += value.detach()
            for name, figure in figures.items():
                sums[name] = sums[name] + figure.detach() if name in sums else figure.detach()
            if not differentiates:
                continue
            for whole, grad in zip([g for g in hidden_grads if g is not None], grads[: len(wanted)], strict=True):
                if grad is not None:
                    whole[rows] = grad
            for accumulated, grad in zip(weight_grads, grads[len(wanted) :], strict=True):
                if grad is not None:
                    accumulated += grad
        ctx.grads = [*hidden_grads, *weight_grads]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        grads = [None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.grads]
        ctx.grads = None
        return (None, None, None, None, *grads)
