"""Losses of uptraining, computed without keeping the logits of a whole batch.

All functions sum over tokens; the trainer divides by the number of tokens of the step, over all ranks and
micro-batches.

Shape legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from recursify.modeling import RecursiveForCausalLM

from .liger_losses import fused_cross_entropy, fused_forward_kl, uses_liger
from .settings import LayerDistillation, LossBackend

Sums = dict[str, Tensor]
"""Mapping from names to figures summed over tokens, without gradients."""

ChunkLoss = Callable[[list[Tensor], slice], tuple[Tensor, Sums]]
"""Function from chunks ``[n, D]`` of hidden states, and the rows of their tokens, to a summed loss and figures."""


def add_sums(total: Sums, sums: Sums) -> None:
    """Add ``sums`` to ``total`` in place."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


def cross_entropy(logits: Tensor, targets: Tensor, backend: LossBackend = "torch") -> Tensor:
    """``Σ_n −log softmax(logits_n)[target_n]`` in nats, for logits ``[N, V]`` and targets ``[N]``."""
    if uses_liger(backend, logits):
        return fused_cross_entropy(logits, targets)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def forward_kl(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, backend: LossBackend = "torch"
) -> Tensor:
    """``T² Σ_n KL(teacher_n ‖ model_n)`` in nats, both distributions at temperature ``T``, for logits ``[N, V]``.

    The factor ``T²`` makes the size of gradients independent of ``T`` (Hinton et al. 2015, section 2). The teacher's
    logits get no gradient.
    """
    if uses_liger(backend, logits):
        return fused_forward_kl(logits, teacher_logits.detach(), temperature)
    log_probs = (logits.float() / temperature).log_softmax(-1)
    teacher_log_probs = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum") * temperature**2


def weighted_coefficients(num_exits: int) -> list[float]:
    """``i / Σ_j j`` for ``i = 1 .. num_exits``, including the last recursion (CALM; RRT table J.1, "weighted CE")."""
    total = num_exits * (num_exits + 1) / 2
    return [index / total for index in range(1, num_exits + 1)]


def uniform_teachers(num_shallow: int, num_layers: int) -> list[int]:
    """Index (from 0) of the teacher layer of each of the first ``num_shallow`` layers, evenly spaced up to the last.

    FREE's ``kd_unif`` (arXiv 2310.05424). For 24 layers and 4, 6, 8 or 12 shallow ones its code lists the same; its
    list for 10 differs by one in places.
    """
    return [math.floor((index + 1) * num_layers / num_shallow + 0.5) - 1 for index in range(num_shallow)]


def dynamic_pairs(distances: Tensor, teachers: list[int]) -> list[tuple[int, int]]:
    """Pairs ``(student, teacher)`` of FREE's ``kd_dyna``, last teacher first.

    From the last teacher to the first, the nearest student is chosen among those before the previous choice; if none is
    left, the first student is chosen again.

    Args:
        distances: Distances ``[S, len(teachers)]`` of every student to every teacher.
        teachers: Layer indices of the teachers, ascending.
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
        states: Hidden states ``[N, D]`` of every layer, after the final norm.
        num_shallow: Number of student layers, the first ones; all layers can be teachers.
        kind: Pairing: ``kd_last`` (last student, last layer), ``kd_unif`` (:func:`uniform_teachers`) or ``kd_dyna``
            (:func:`dynamic_pairs`, with the distances in this batch).

    Returns:
        Mean over pairs of ``Σ_n mean_D (student_n − teacher_n)²``; teachers get no gradient.
    """
    deep = [state.detach().float() for state in states]
    teachers = uniform_teachers(num_shallow, len(states))
    if kind == "kd_last":
        pairs = [(num_shallow - 1, len(states) - 1)]
    elif kind == "kd_unif":
        pairs = list(enumerate(teachers))
    else:
        distances = [
            torch.stack([_squared_error(deep[student], deep[teacher]) for teacher in teachers])
            for student in range(num_shallow)
        ]
        pairs = dynamic_pairs(torch.stack(distances), teachers)
    return sum(_squared_error(states[s].float(), deep[t]) for s, t in pairs) / torch.tensor(float(len(pairs)))


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1).sum()


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
    return softcapped(head(hidden), teacher.config)


def softcapped(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """``c · tanh(logits / c)`` if the config of a dense model has a softcap ``c``."""
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def chunked_loss(hidden: list[Tensor], weights: list[nn.Parameter], loss: ChunkLoss, chunk: int) -> tuple[Tensor, Sums]:
    """Sum ``loss`` over chunks of tokens, with gradients computed chunk by chunk in the forward pass.

    The logits ``[N, V]`` are neither kept whole nor recomputed: the memory for the backward pass is that of ``hidden``
    and ``weights``.

    Args:
        hidden: Inputs ``[N, D]`` of ``loss``, chunked along N.
        weights: Parameters that ``loss`` uses; frozen ones are ignored.
        loss: Loss of a chunk.
        chunk: Number of tokens per chunk.

    Returns:
        The loss, a float32 scalar that backpropagates into ``hidden`` and ``weights``, and the summed figures.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    sums: Sums = {}
    # Inside the function gradients are disabled, and needs_input_grad is True even under no_grad: pass the mode.
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
                    inputs = [piece for piece in pieces if piece.requires_grad]
                    grads = torch.autograd.grad(value, [*inputs, *weights], allow_unused=True)
            total += value.detach()
            add_sums(sums, {name: figure.detach() for name, figure in figures.items()})
            if not differentiates:
                continue
            for hidden_grad, grad in zip([g for g in hidden_grads if g is not None], grads[: len(inputs)], strict=True):
                if grad is not None:
                    hidden_grad[rows] = grad
            for accumulated, grad in zip(weight_grads, grads[len(inputs) :], strict=True):
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
