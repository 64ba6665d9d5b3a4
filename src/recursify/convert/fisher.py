"""Diagonal Fisher information of a dense model's linear weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.progress import Progress


@torch.enable_grad()
def fisher_information(
    checkpoint: DenseCheckpoint, stem: str, windows: Tensor, num_context: int, progress: Progress
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss over token windows ``[N, T]``, by parameter name.

    The whole dense model, its gradients and their squares are in memory, unlike in the rest of the calibration.
    ``stem`` is the prefix of the layers' parameter names. The first ``num_context`` tokens of a window are not
    predicted.
    """
    model = checkpoint.load_model(torch.float32)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {n: p for n, p in model.named_parameters() if n in linears and n.startswith(stem)}
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for done, window in enumerate(windows):
        model.zero_grad()
        labels = window.masked_fill(torch.arange(len(window)) < num_context, -100)
        model(window[None], labels=labels[None]).loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            fisher[name] += weight.grad.square() / len(windows)
        progress("fisher", done + 1, len(windows))
    return fisher
