"""Routers: which tokens go through which recursions (Mixture-of-Recursions, arXiv 2507.10524, "MoR").

An *expert-choice* router stands at the entry of every recursion and scores its tokens. In training the ``k`` best of a
sequence go in, where the capacity says how many those are; ``k`` best of a sequence is not causal, so in inference the
trained score of a token alone decides. A *token-choice* router stands at the first entry and gives each token the
number of its recursions, at training and inference alike. A token that does not go into a recursion is not touched.

Shape legend: B batch, T tokens, D hidden size, R recursions.

This file travels inside every checkpoint: it imports torch only.
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
    """By depth, of a config with routers: its own, else :func:`default_capacities`."""
    return config.router_capacities or default_capacities(config.num_recursions)


def alpha_of(config: Any) -> float:
    """What a gate is scaled by: the config's ``router_alpha``, else MoR's, by the kind of router."""
    if config.router_alpha is not None:
        return float(config.router_alpha)
    return 0.1 if config.router == "expert_choice" else 1.0


def activation_of(config: Any) -> str:
    """The config's ``router_activation``, else MoR's, by the kind of router."""
    return config.router_activation or ("sigmoid" if config.router == "expert_choice" else "softmax")


def inference_threshold(config: Any, depth: int) -> float | None:
    """The score from which on a token goes into the recursion at ``depth`` in inference; None takes all."""
    if config.router_thresholds is not None:
        return float(config.router_thresholds[depth]) or None  # a probability is never below 0
    capacities = capacities_of(config)
    if config.router_width == "random":
        return 1 - capacities[depth] / (capacities[depth - 1] if depth else 1.0)
    return None if capacities[depth] == 1 else 0.5


class TokenRouter(nn.Module):
    """Scores tokens, of hidden states scaled to unit root mean square: those of pretrained models grow with depth.

    Its last map starts at zero, so that every score is even, and a model with routers is the model without.

    Args:
        width: A name in :data:`ROUTER_WIDTHS`.
        hidden_size: ``D``.
        num_options: Scores per token: 1, or as many as there are recursions to choose from.
        temperature: Divides what the router sees.

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
        if num_options > 1:
            self.register_buffer("bias", torch.zeros(num_options))
            self.register_buffer("load", torch.zeros(num_options))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., options]``, float32, of ``[..., D]``; where the router is chance, of evenly drawn scores."""
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


def make_routers(config: Any) -> nn.ModuleList:
    """The routers of a config: one per recursion, or the one of token choice."""
    count, options = (config.num_recursions, 1) if config.router == "expert_choice" else (1, config.num_recursions)
    return nn.ModuleList(
        TokenRouter(config.router_width, config.hidden_size, options, config.router_temperature) for _ in range(count)
    )


def make_auxiliary_routers(config: Any) -> nn.ModuleList | None:
    """The second routers of a config that has such: MLPs, whatever the first ones are."""
    if config.router_decision != "auxiliary":
        return None
    return nn.ModuleList(
        TokenRouter("mlp", config.hidden_size, 1, config.router_temperature) for _ in range(config.num_recursions)
    )


# --- Choosing ------------------------------------------------------------------------------------------------------


def choose_top_k(scores: Tensor, candidates: Tensor, capacity: float) -> Tensor:
    """The ``k = max(1, int(capacity · T))`` candidates of each sequence with the highest scores, of equal ones the
    first; bool ``[B, T]``. It looks at the whole sequence: for training.

    Args:
        scores: ``[B, T]``.
        candidates: Bool ``[B, T]``. Where they are fewer than ``k``, all of them.
        capacity: Part of ``T``, not of the candidates.
    """
    ranked = scores.detach().masked_fill(~candidates, -torch.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : tokens_of(capacity, scores.shape[-1])]
    return torch.zeros_like(candidates).scatter(-1, best, True) & candidates


def choose_above(logits: Tensor, candidates: Tensor, threshold: float | None) -> Tensor:
    """Candidates whose probability ``sigmoid(logit)`` is at least ``threshold``, all if that is None; bool ``[B, T]``.

    A token is judged by itself, so this is causal.
    """
    return candidates if threshold is None else candidates & (logits.detach().sigmoid() >= threshold)


def choose_depths(scores: Tensor, bias: Tensor) -> Tensor:
    """The last depth ``[B, T]`` that each token goes to: the option with the highest ``score + bias``.

    The bias evens out loads without a loss (MoR, section 3; Wang et al. 2024), and has no part in the gate. Of equal
    scores the deepest wins, so that a router that has learnt nothing skips nothing.

    Args:
        scores: Activated, ``[B, T, R]``.
        bias: ``[R]``.
    """
    return scores.shape[-1] - 1 - (scores.detach() + bias).flip(-1).argmax(-1)


def activated(logits: Tensor, activation: str) -> Tensor:
    """Scores between 0 and 1, of logits ``[..., options]``."""
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)


def even_scores(logits: Tensor, activation: str) -> Tensor:
    """What :func:`activated` makes of a router that has learnt nothing, to the last bit."""
    return activated(torch.zeros_like(logits), activation)


def expert_gates(config: Any, router: TokenRouter, logits: Tensor) -> Tensor:
    """The gates ``[...]`` of an expert-choice router's ``logits [..., 1]``; even where the router is chance."""
    activation = activation_of(config)
    even = even_scores(logits, activation)
    scores = even if router.weight is None else activated(logits, activation)
    if config.router_gate == "residual":
        scores = scores - even
    return alpha_of(config) * scores[..., 0]


def depths_and_gates(config: Any, router: TokenRouter, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of a token-choice router's ``logits [..., R]``: the last depth of each token and the gate there, ``[...]``."""
    activation = activation_of(config)
    scores = activated(logits, activation)
    depths = choose_depths(scores, router.bias)
    if config.router_gate == "residual":
        scores = scores - even_scores(logits, activation)
    return depths, alpha_of(config) * scores.gather(-1, depths.unsqueeze(-1)).squeeze(-1)


def gated(entered: Tensor, made: Tensor, gate: Tensor, kind: str) -> Tensor:
    """What leaves a recursion, ``[..., D]``.

    ``residual``: ``h + γ (Block(h) − h)`` with ``γ = 1 + gate``, written as ``Block(h) + gate · (Block(h) − h)``, which
    at a gate of 0 is ``Block(h)`` to the last bit. ``mor``: ``h + gate · Block(h)``.

    Args:
        entered: ``h``.
        made: ``Block(h)``, its own residual stream included.
        gate: ``[...]``: ``α (g − g₀)`` for ``residual``, ``g₀`` being an untrained router's score, or ``α g``.
        kind: Of :data:`ROUTER_GATES`.
    """
    scale = gate.to(made.dtype).unsqueeze(-1)
    return made + scale * (made - entered) if kind == "residual" else entered + scale * made


@dataclass
class Routing:
    """What routers decided in one forward.

    Attributes:
        logits: Per depth ``[B, T]``; in token choice one tensor ``[B, T, R]``. Float32, with gradients.
        deciding: Per depth ``[B, T]``: the logits that inference decides by, where auxiliary routers make them.
        candidates: Per depth, bool ``[B, T]``: the tokens that could go in.
        selected: Per depth, bool ``[B, T]``: those that did. Padding never does.
    """

    logits: list[Tensor]
    deciding: list[Tensor]
    candidates: list[Tensor]
    selected: list[Tensor]

    @property
    def depths(self) -> Tensor:
        """The last depth ``[B, T]`` that each token went through; -1 where none."""
        return torch.stack(self.selected).sum(0) - 1
