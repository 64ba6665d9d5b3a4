"""Losses of uptraining, and how they are computed without holding the logits of a whole batch.

All functions sum over tokens and leave the division to the caller, who knows how many tokens the whole step has on all
ranks and micro-batches.

Shape legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .liger_losses import fused_cross_entropy, fused_forward_kl, uses_liger
from .settings import LayerDistillation, LossBackend

Sums = dict[str, Tensor]
"""Figures summed over tokens, by name; none of them carries gradients."""

ChunkLoss = Callable[[list[Tensor], slice], tuple[Tensor, Sums]]
"""Given chunks ``[n, D]`` of the hidden states and which tokens they are, a summed loss and figures to report."""


def cross_entropy(logits: Tensor, targets: Tensor, backend: LossBackend = "torch") -> Tensor:
    """``Σ_n −log softmax(logits_n)[target_n]`` in nats, of ``[N, V]`` logits and ``[N]`` targets."""
    if uses_liger(backend, logits):
        return fused_cross_entropy(logits, targets)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def forward_kl(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, backend: LossBackend = "torch"
) -> Tensor:
    """``T² Σ_n KL(teacher_n ‖ model_n)`` in nats, both distributions at temperature ``T``, of ``[N, V]`` logits.

    The factor ``T²`` keeps gradients of one size over temperatures (Hinton et al. 2015, section 2). The teacher's side
    gets no gradient.
    """
    if uses_liger(backend, logits):
        return fused_forward_kl(logits, teacher_logits.detach(), temperature)
    mine = (logits.float() / temperature).log_softmax(-1)
    theirs = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return F.kl_div(mine, theirs, log_target=True, reduction="sum") * temperature**2


def weighted_coefficients(num_exits: int) -> list[float]:
    """``i / Σ_j j`` for ``i = 1 .. num_exits``, the last recursion among them (CALM; RRT table J.1, "weighted CE")."""
    total = num_exits * (num_exits + 1) / 2
    return [index / total for index in range(1, num_exits + 1)]


def uniform_teachers(num_shallow: int, num_layers: int) -> list[int]:
    """Which layer teaches each of the first ``num_shallow``, evenly spread and ending with the last (0-based).

    FREE's ``kd_unif`` (arXiv 2310.05424). For 24 layers its code lists these for 4, 6, 8 and 12 shallow layers; its
    list for 10 was written by hand and differs by one in places.
    """
    return [math.floor((index + 1) * num_layers / num_shallow + 0.5) - 1 for index in range(num_shallow)]


def dynamic_pairs(distances: Tensor, teachers: list[int]) -> list[tuple[int, int]]:
    """FREE's ``kd_dyna``: which shallow layer learns from which teacher, as ``(student, teacher)``, last teacher first.

    From the last teacher to the first, the student of least distance is taken among those before the student of the
    teacher before; where none is left, the first student learns again.

    Args:
        distances: ``[S, len(teachers)]``, of every student to every teacher.
        teachers: Layer indices, ascending.
    """
    pairs = []
    bound = len(distances)
    for column in reversed(range(len(teachers))):
        student = int(distances[:bound, column].argmin()) if bound else 0
        pairs.append((student, teachers[column]))
        bound = student
    return pairs


def layer_distillation(states: list[Tensor], num_shallow: int, kind: LayerDistillation) -> Tensor:
    """FREE's distillation of deep layers into shallow ones: mean squared error of normed hidden states.

    Args:
        states: ``[N, D]`` after every layer, after the final norm.
        num_shallow: The first so many layers are students; all layers can teach.
        kind: ``kd_last``: the last student from the last layer. ``kd_unif``: :func:`uniform_teachers`. ``kd_dyna``:
            :func:`dynamic_pairs`, by this batch's own distances.

    Returns:
        Mean over pairs of ``Σ_n mean_D (student_n − teacher_n)²``; the teacher's side gets no gradient.
    """
    deep = [state.detach().float() for state in states]
    teachers = uniform_teachers(num_shallow, len(states))
    if kind == "kd_last":
        pairs = [(num_shallow - 1, len(states) - 1)]
    elif kind == "kd_unif":
        pairs = list(enumerate(teachers))
    else:
        rows = [
            [_squared_error(deep[student], deep[teacher]) for teacher in teachers] for student in range(num_shallow)
        ]
        pairs = dynamic_pairs(torch.stack([torch.stack(row) for row in rows]), teachers)
    return sum(_squared_error(states[s].float(), deep[t]) for s, t in pairs) / torch.tensor(float(len(pairs)))


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1).sum()


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
    # Inside the function gradients are off, and which inputs need some is said even where nobody will ask.
    total = _ChunkedLoss.apply(loss, chunk, sums, torch.is_grad_enabled(), len(hidden), *hidden, *trained)
    return total, sums


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: ChunkLoss, chunk: int, sums: Sums, differentiates: bool, count: int, *tensors: Tensor
    ) -> Tensor:
        hidden, weights = tensors[:count], tensors[count:]
        differentiates = differentiates and any(ctx.needs_input_grad)
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
        return (None, None, None, None, None, *grads)
