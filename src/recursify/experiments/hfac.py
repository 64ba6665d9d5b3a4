"""H-Fac: an optimizer that stores each moment of a matrix as two vectors.

"Memory-Efficient Optimization with Factorized Hamiltonian Descent", arXiv 2406.09958 (AISTATS 2025). The formulas are
taken from https://junaidaliop.github.io/zij/math/hfac and have not been compared with the paper. Initial values, the
treatment of vectors and the constants, which that page omits, may differ from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from recursify.errors import SettingsError


class HFac(torch.optim.Optimizer):
    """H-Fac with decoupled weight decay.

    For a matrix ``X [m, n]`` with gradient ``G``, at step ``t`` counted from 1, with all states 0 before::

        β̂ = β (1 − βᵗ⁻¹) / (1 − βᵗ)                       for both β, so that the averages below are unbiased
        u ← β̂₁ u + (1 − β̂₁) G 1ₙ / n                      [m]      v ← β̂₁ v + (1 − β̂₁) Gᵀ 1ₘ / m                [n]
        r ← β̂₂ r + (1 − β̂₂) (G² + ε) 1ₙ                   [m]      s ← β̂₂ s + (1 − β̂₂) (G² + ε)ᵀ 1ₘ              [n]
        φ = β̂₁ (u 1ₙᵀ − G 1ₙ 1ₙᵀ / n) / √(r 1ₙᵀ / n)               ψ = β̂₁ (1ₘ vᵀ − 1ₘ 1ₘᵀ G / m) / √(1ₘ sᵀ / m)
        V = r sᵀ / (1ₘᵀ r)
        X ← X − η ((φ + ψ) / 2 + clip(G / √V) + λ X)       clip(U) = U / max(1, RMS(U) / d)

    The gradient is scaled and clipped as in Adafactor. Momentum adds the difference between the row and column means of
    the gradient and their averages, so it needs no state of size m×n either. Parameters with more than two dimensions
    are stacks of matrices ``[..., m, n]`` (residuals are stacked by depth), which are updated and clipped one by one.
    Vectors, scalars, and groups with ``factored=False`` use Adam: ``m ← β̂₁ m + (1 − β̂₁) g``,
    ``v ← β̂₂ v + (1 − β̂₂) g²``, ``x ← x − η (m / (√v + vector_eps) + λ x)``.

    The state is ``2 (m + n)`` float32 numbers per matrix.

    Args:
        params: Parameters or parameter groups, which may have their own values of the other arguments.
        lr: Learning rate η. The RMS of an update before it is at most about 1, as for Adam, so similar rates work.
        betas: Decay rates β₁ and β₂.
        eps: Constant ε, added to squared gradients of matrices.
        vector_eps: Constant added to the root of squared gradients of vectors.
        clip_threshold: Threshold d of the RMS.
        weight_decay: Decay λ.
        factored: True to factorize the moments of matrices.

    Raises:
        SettingsError: A value is out of range.
    """

    supports_sharding = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-30,
        vector_eps: float = 1e-8,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        factored: bool = True,
    ):
        if lr < 0 or weight_decay < 0:
            raise SettingsError(f"H-Fac's lr and weight_decay cannot be negative, got {lr} and {weight_decay}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise SettingsError(f"H-Fac's betas must be at least 0 and below 1, got {betas}.")
        if eps <= 0 or vector_eps <= 0 or clip_threshold <= 0:
            raise SettingsError(
                f"H-Fac's eps, vector_eps and clip_threshold must be above 0, got {eps}, {vector_eps} and "
                f"{clip_threshold}."
            )
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "factored": factored}
        constants = {"eps": eps, "vector_eps": vector_eps, "clip_threshold": clip_threshold}
        super().__init__(params, {**defaults, **constants})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the result of ``closure``."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.float()
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                first, second = (_corrected(beta, state["step"]) for beta in group["betas"])
                if group["factored"] and parameter.ndim > 1:
                    update = _factored_update(gradient, state, first, second, group)
                else:
                    update = _adam_update(gradient, state, first, second, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])
        return loss


def _corrected(beta: float, step: int) -> float:
    """``β̂``: 0 at the first step, so that the moving average starts at its first value, and ``β`` in the limit."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _factored_update(
    gradient: Tensor, state: dict[str, Any], first: float, second: float, group: dict[str, Any]
) -> Tensor:
    """The update ``[..., m, n]`` of a matrix, before learning rate and decay; changes ``state``."""
    rows, columns = gradient.shape[-2:]
    if "row_mean" not in state:
        for name, axis in (("row_mean", -1), ("column_mean", -2), ("row_square", -1), ("column_square", -2)):
            state[name] = torch.zeros_like(gradient.select(axis, 0))
    u, v, r, s = (state[name] for name in ("row_mean", "column_mean", "row_square", "column_square"))
    row_mean, column_mean = gradient.mean(-1), gradient.mean(-2)
    u.lerp_(row_mean, 1 - first)
    v.lerp_(column_mean, 1 - first)
    squared = gradient.square() + group["eps"]
    r.lerp_(squared.sum(-1), 1 - second)
    s.lerp_(squared.sum(-2), 1 - second)
    # The product of r and s could underflow to 0 in float32 (ε is 1e-30).
    scaled = gradient * (r / r.sum(-1, keepdim=True)).rsqrt().unsqueeze(-1) * s.rsqrt().unsqueeze(-2)
    size = scaled.square().mean((-2, -1), keepdim=True).sqrt()
    scaled /= (size / group["clip_threshold"]).clamp(min=1)
    phi = first * (u - row_mean) / (r / columns).sqrt()
    psi = first * (v - column_mean) / (s / rows).sqrt()
    return scaled.add_(phi.unsqueeze(-1), alpha=0.5).add_(psi.unsqueeze(-2), alpha=0.5)


def _adam_update(gradient: Tensor, state: dict[str, Any], first: float, second: float, group: dict[str, Any]) -> Tensor:
    """Adam's update of a vector, before learning rate and decay; changes ``state``."""
    if "mean" not in state:
        state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].lerp_(gradient.square(), 1 - second)
    return state["mean"] / (state["square"].sqrt() + group["vector_eps"])
