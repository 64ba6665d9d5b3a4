"""Cross-entropy and KL in Liger's Triton kernels: loss and gradient of ``[n, V]`` logits in one go.

A kernel reads a row of logits, works in registers, and writes the row's gradient over it, where torch stores float32
log-softmaxes, their products and their gradients beside each other. Since the logits are read again, by the next term
and for the figures, each term gives its kernel a float32 copy, which then is the gradient; nothing else of that size is
kept. Besides float32 logits ``[n, V]``, a cross-entropy holds at most 1 matrix of their size (torch: 3) and a KL 2
(torch: 5), forward and backward.

Liger's own ``liger_kl_div`` starts from log-softmaxes and so keeps what we want rid of. Its fused linear losses
multiply by one matrix, give no logits for a second term, and cannot read out by a norm, a residual or a softcap; of the
KL among them we take the inner kernel, which is registered as an operation of its own.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from recursify.errors import SettingsError

from .settings import LossBackend


@functools.cache
def liger_is_installed() -> bool:
    """Whether liger-kernel is, which brings Triton."""
    return importlib.util.find_spec("liger_kernel") is not None


def uses_liger(backend: LossBackend, logits: Tensor) -> bool:
    """Whether Liger's kernels are to take these logits: asked for, or ``auto`` and on a GPU that has it."""
    return backend == "liger" or (backend == "auto" and logits.is_cuda and liger_is_installed())


def check_backend(backend: LossBackend, device: torch.device) -> None:
    """Refuse Liger where it cannot run.

    Raises:
        SettingsError: Liger is asked for, and is not installed or ``device`` is no GPU.
    """
    if backend != "liger":
        return
    if not liger_is_installed():
        raise SettingsError(
            "loss_backend 'liger' needs liger-kernel, which is not installed. Run: pip install 'recursify[liger]'. Or "
            "leave loss_backend at auto, which takes it where it can."
        )
    if device.type != "cuda":
        raise SettingsError(
            f"loss_backend 'liger' needs a GPU that Triton compiles for, and this run's device is '{device}'. Use "
            f"loss_backend auto or torch."
        )


def fused_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`~recursify.uptrain.losses.cross_entropy` of ``[n, V]`` logits, which stay as they are.

    Its gradient can be taken once.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    if torch.is_grad_enabled() and logits.requires_grad:
        # Float32 also because the kernel rounds losses to its input's dtype: 888.56 of 63 tokens is 884 in bfloat16.
        return liger_cross_entropy(_copy(logits), targets, reduction="sum")
    return liger_cross_entropy(logits.detach().float(), targets, reduction="sum")


def fused_forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """:func:`~recursify.uptrain.losses.forward_kl` of ``[n, V]`` logits, which stay as they are.

    Its gradient can be taken once.
    """
    loss: Tensor = _FusedForwardKL.apply(logits, teacher_logits, temperature)
    return loss


def _copy(logits: Tensor) -> Tensor:
    """In float32, and never ``logits`` itself: kernels write gradients over it."""
    return logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class _FusedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        import liger_kernel.functional  # noqa: F401  (tells the dispatcher where operations are)
        from liger_kernel.backends import dispatch

        # Before the copy, so that the division's result is gone when the copy is made.
        teacher = (teacher_logits.float() / temperature).softmax(-1)
        losses, gradient = dispatch(
            "kl_loss_and_grad",
            _copy(logits),
            teacher,
            None,
            -100,
            float(temperature),
            # Smaller probabilities are taken for this one in their own logarithm; under the smallest float none is.
            torch.finfo(torch.float32).tiny,
            float(temperature) ** 2,
        )
        ctx.dtype = logits.dtype
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "a fused loss was differentiated twice"
        return gradient.mul_(scale).to(ctx.dtype), None, None
