"""Cross-entropy and KL with Liger's Triton kernels, which compute loss and gradient of ``[n, V]`` logits at once.

A kernel reads a row of logits and overwrites it with its gradient, where torch stores float32 log-softmaxes, products
and gradients side by side. The logits are needed again by the next term and the figures, so each term passes a float32
copy, which becomes the gradient. Besides float32 logits ``[n, V]``, a cross-entropy keeps at most 1 matrix of their
size (torch: 3) and a KL 2 (torch: 5), forward and backward.

Liger's ``liger_kl_div`` starts from log-softmaxes, so it does not save that memory. Its fused linear losses multiply by
one matrix, return no logits for a second term, and support no norm, residual or softcap; we use the inner kernel of the
KL among them, which is registered as an operation of its own.
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
    """Tell whether liger-kernel is installed (it depends on Triton)."""
    return importlib.util.find_spec("liger_kernel") is not None


def uses_liger(backend: LossBackend, logits: Tensor) -> bool:
    """Tell whether to use Liger's kernels; with ``auto``, if the logits are on a GPU and Liger is installed."""
    return backend == "liger" or (backend == "auto" and logits.is_cuda and liger_is_installed())


def check_backend(backend: LossBackend, device: torch.device) -> None:
    """Check that Liger can run if it is chosen.

    Raises:
        SettingsError: Liger is not installed, or ``device`` is not a GPU.
    """
    if backend != "liger":
        return
    if not liger_is_installed():
        raise SettingsError(
            "loss_backend 'liger' needs liger-kernel, which is not installed. Run: pip install 'recursify[liger]'. Or "
            "set loss_backend to auto, which uses it where possible."
        )
    if device.type != "cuda":
        raise SettingsError(
            f"loss_backend 'liger' needs a GPU that Triton compiles for, and this run's device is '{device}'. Use "
            f"loss_backend auto or torch."
        )


def fused_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`~recursify.uptrain.losses.cross_entropy` of logits ``[n, V]``; supports one backward pass."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    if torch.is_grad_enabled() and logits.requires_grad:
        # The kernel rounds losses to the dtype of its input: 888.56 of 63 tokens is 884 in bfloat16.
        return liger_cross_entropy(_copy(logits), targets, reduction="sum")
    return liger_cross_entropy(logits.detach().float(), targets, reduction="sum")


def fused_forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """:func:`~recursify.uptrain.losses.forward_kl` of logits ``[n, V]``; supports one backward pass."""
    loss: Tensor = _FusedForwardKL.apply(logits, teacher_logits, temperature)
    return loss


def _copy(logits: Tensor) -> Tensor:
    """A float32 copy of the logits, for the kernel to overwrite with the gradient."""
    return logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class _FusedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        import liger_kernel.functional  # noqa: F401  (registers the operations)
        from liger_kernel.backends import dispatch

        # Before the copy, so that the quotient is freed when the copy is made.
        teacher = (teacher_logits.float() / temperature).softmax(-1)
        losses, gradient = dispatch(
            "kl_loss_and_grad",
            _copy(logits),
            teacher,
            None,
            -100,
            float(temperature),
            # The kernel clamps probabilities in the logarithm to this; none is smaller than the smallest float.
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
        assert gradient is not None, "a fused loss supports one backward pass"
        return gradient.mul_(scale).to(ctx.dtype), None, None
