"""Routers, which decide the recursions that each token runs (Mixture-of-Recursions, arXiv 2507.10524, "MoR").

An *expert-choice* router scores the tokens at the entry of every recursion. In training the ``k`` best of a sequence
run it, ``k`` being set by the capacity; that is not causal, so at inference the trained score of each token alone
decides. A *token-choice* router gives each token the number of its recursions at the first entry, in training and at
inference. A token that does not run a recursion is not changed.

Shape legend: B batch, T tokens, D hidden size, R recursions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_recursive import ROUTER_WIDTHS

RouterKind = Literal["expert_choice", "token_choice"]


def default_capacities(num_recursions: int) -> list[float]:
    """``(R − r + 1) / R`` for ``r = 1 .. R``: all tokens in the first recursion, ``1/R`` of them in the last."""
    return [(num_recursions - depth) / num_recursions for depth in range(num_recursions)]


def tokens_of(capacity: float, length: int) -> int:
    """``k = max(1, int(c·T))`` of a sequence of ``length`` tokens."""
    return max(1, int(capacity * length))


def warmed_up(capacity: float, progress: float) -> float:
    """``c + (1 − c) · ½ (1 + cos(π p))``, from 1 at ``progress`` 0 to ``capacity`` at 1 and beyond."""
    return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def capacities_of(config: Any) -> list[float]:
    """Capacities by depth: the configuration's, else :func:`default_capacities`."""
    return config.router_capacities or default_capacities(config.num_recursions)


def alpha_of(config: Any) -> float:
    """Factor on gates: the configuration's ``router_alpha``, else MoR's for the kind of router."""
    if config.router_alpha is not None:
        return float(config.router_alpha)
    return 0.1 if config.router == "expert_choice" else 1.0


def activation_of(config: Any) -> str:
    """Activation: the configuration's, else MoR's for the kind of router."""
    return config.router_activation or ("sigmoid" if config.router == "expert_choice" else "softmax")


def inference_threshold(config: Any, depth: int) -> float | None:
    """Lowest score of a token that runs the recursion at ``depth`` at inference; None for all tokens."""
    if config.router_thresholds is not None:
        return float(config.router_thresholds[depth]) or None  # a probability is never below 0
    capacities = capacities_of(config)
    if config.router_width == "random":
        return 1 - capacities[depth] / (capacities[depth - 1] if depth else 1.0)
    return None if capacities[depth] == 1 else 0.5


class TokenRouter(nn.Module):
    """Scores of tokens, given hidden states scaled to unit root mean square: in pretrained models they grow with depth.

    Its last map starts at zero, so all scores are even and a model with new routers equals the model without.

    Args:
        width: Architecture, a name in ``ROUTER_WIDTHS``.
        hidden_size: Hidden size ``D``.
        num_options: Number of scores per token: 1, or the number of recursions to choose from.
        temperature: Divisor of the router's input.

    Parameters: ``weight [options, D]``, or ``inner [2D, D]`` and ``weight [options, 2D]``, without biases. They are
    not in ``nn.Linear``s, which adapters and quantizers would take for the model's own. Token choice also has the
    buffers ``bias`` and ``load [options]``, see :func:`choose_depths` and ``uptrain/routers.py``.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, width: str, hidden_size: int, num_options: int, temperature: float):
        super().__init__()
        self.width, self.temperature, self.num_options = width, temperature, num_options
        factor = ROUTER_WIDTHS[width]
        self.inner = nn.Parameter(torch.empty(factor * hidden_size, hidden_size)) if factor else None
        self.weight = None
        if factor is not None:
            self.weight = nn.Parameter(torch.empty(num_options, (factor or 1) * hidden_size))
        for name in ("bias", "load") if num_options > 1 else ():
            self.register_buffer(name, torch.zeros(num_options))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., options]``, float32, of ``[..., D]``; a random router draws uniform scores."""
        if self.weight is None:
            return torch.logit(torch.rand(*states.shape[:-1], 1, device=states.device))
        seen = F.rms_norm(states, states.shape[-1:]) / self.temperature
        if self.inner is not None:
            seen = F.gelu(F.linear(seen, self.inner))
        return F.linear(seen, self.weight).float()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize to even scores."""
        if self.inner is not None:
            init.normal_(self.inner, std=self.inner.shape[1] ** -0.5)
        for zero in (self.weight, *self.buffers()):
            if zero is not None:
                init.zeros_(zero)

    def extra_repr(self) -> str:
        return f"{self.width}, options={self.num_options}"


def make_routers(config: Any) -> tuple[nn.ModuleList, nn.ModuleList | None]:
    """Routers of a configuration, one per recursion or a single one for token choice; and its auxiliary MLPs if any."""

    def routers(width: str, count: int, options: int) -> nn.ModuleList:
        arguments = (width, config.hidden_size, options, config.router_temperature)
        return nn.ModuleList(TokenRouter(*arguments) for _ in range(count))

    depths = config.num_recursions
    auxiliary = routers("mlp", depths, 1) if config.router_decision == "auxiliary" else None
    return routers(config.router_width, *((depths, 1) if config.router == "expert_choice" else (1, depths))), auxiliary


# --- Choosing ------------------------------------------------------------------------------------------------------


def choose_top_k(scores: Tensor, candidates: Tensor, capacity: float) -> Tensor:
    """Select the ``k = max(1, int(capacity · T))`` candidates of each sequence with the best scores: bool ``[B, T]``.

    Of equal scores the first win; of fewer than ``k`` candidates all. It uses the whole sequence: for training.
    """
    ranked = scores.detach().masked_fill(~candidates, -torch.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : tokens_of(capacity, scores.shape[-1])]
    return torch.zeros_like(candidates).scatter(-1, best, True) & candidates


def choose_above(logits: Tensor, candidates: Tensor, threshold: float | None) -> Tensor:
    """Select candidates with ``sigmoid(logit)`` of at least ``threshold``, all for None; causal. Bool ``[B, T]``."""
    return candidates if threshold is None else candidates & (logits.detach().sigmoid() >= threshold)


def choose_depths(scores: Tensor, bias: Tensor) -> Tensor:
    """Last depth ``[B, T]`` that each token runs: the highest of ``scores [B, T, R] + bias [R]``.

    The bias balances loads without a loss (MoR, section 3; Wang et al. 2024), and does not affect the gate. Of equal
    scores the deepest wins, so an untrained router skips nothing.
    """
    return scores.shape[-1] - 1 - (scores.detach() + bias).flip(-1).argmax(-1)


def activated(logits: Tensor, activation: str) -> Tensor:
    """Scores between 0 and 1, of logits ``[..., options]``."""
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)


def even_scores(logits: Tensor, activation: str) -> Tensor:
    """Scores of an untrained router, equal to those of :func:`activated` to the last bit."""
    return activated(torch.zeros_like(logits), activation)


def expert_gates(config: Any, router: TokenRouter, logits: Tensor) -> Tensor:
    """Gates ``[...]`` of an expert-choice router's ``logits [..., 1]``; even for a random router."""
    activation = activation_of(config)
    even = even_scores(logits, activation)
    scores = even if router.weight is None else activated(logits, activation)
    if config.router_gate == "residual":
        scores = scores - even
    return alpha_of(config) * scores[..., 0]


def depths_and_gates(config: Any, router: TokenRouter, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Last depth of each token and its gate there, ``[...]``, given a token-choice router's ``logits [..., R]``."""
    activation = activation_of(config)
    scores = activated(logits, activation)
    depths = choose_depths(scores, router.bias)
    if config.router_gate == "residual":
        scores = scores - even_scores(logits, activation)
    return depths, alpha_of(config) * scores.gather(-1, depths.unsqueeze(-1)).squeeze(-1)


def gated(entered: Tensor, made: Tensor, gate: Tensor, kind: str) -> Tensor:
    """Combine a recursion's input ``h`` and output ``Block(h)``, ``[..., D]``, by ``kind`` (``ROUTER_GATES``).

    ``residual``: ``h + γ (Block(h) − h)`` with ``γ = 1 + gate``, written as ``Block(h) + gate · (Block(h) − h)``, which
    at a gate of 0 is ``Block(h)`` to the last bit. ``mor``: ``h + gate · Block(h)``. The gate ``[...]`` is
    ``α (g − g₀)`` for ``residual``, ``g₀`` being an untrained router's score, or ``α g``.
    """
    scale = gate.to(made.dtype).unsqueeze(-1)
    return made + scale * (made - entered) if kind == "residual" else entered + scale * made


@dataclass
class Routing:
    """Decisions of the routers in one forward.

    Attributes:
        logits: Logits ``[B, T]`` per depth, or in token choice one tensor ``[B, T, R]``; float32, with gradients.
        deciding: Logits ``[B, T]`` per depth that decide at inference, if auxiliary routers compute them.
        candidates: Masks ``[B, T]`` per depth of the tokens that could run it.
        selected: Masks ``[B, T]`` per depth of the tokens that run it, without padding.
    """

    logits: list[Tensor]
    deciding: list[Tensor]
    candidates: list[Tensor]
    selected: list[Tensor]

    @property
    def depths(self) -> Tensor:
        """Last depth ``[B, T]`` that each token ran; -1 for none."""
        return torch.stack(self.selected).sum(0) - 1
