"""Training routers: which tokens are worth another recursion, decided so that inference can decide alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recursify.errors import SettingsError
from recursify.evaluation.router_calibration import calibrate_thresholds
from recursify.modeling import RecursiveForCausalLM, RecursiveOutput, RouterKind, Routing, TokenRouter
from recursify.modeling.recursive_routing import activated, activation_of, capacities_of, choose_top_k, warmed_up

from .data import IGNORED
from .losses import Sums
from .objectives import Heal
from .settings import ROUTER_FIELDS

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 4096
"""Thresholds are chosen on so much training text: a load of one half is then known to about 1 %."""


# --- Losses, each a mean over the tokens of a sequence, ``[B]`` ----------------------------------------------------


def auxiliary_loss(logits: Tensor, selected: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy of ``sigmoid(logit)`` with whether a candidate is among the best ``k``, ``[B]``.

    It drives scores to both sides of 0.5, where inference, which sees no later token, draws the line (MoR, arXiv
    2507.10524, section 2.2.1).

    Args:
        logits: ``[B, T]``.
        selected: Bool ``[B, T]``.
        candidates: Bool ``[B, T]``; the others do not count.
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), selected.float(), reduction="none")
    return (each * candidates).sum(-1) / candidates.sum(-1).clamp(min=1)


def balancing_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """``Σ_i f_i P_i``, ``f_i = (R/T) #{t: chosen_t = i}`` and ``P_i`` the mean score, ``[B]``; 1 at perfect balance.

    Args:
        scores: Activated, ``[B, T, R]``; the gradient is theirs.
        chosen: Depths ``[B, T]``.
    """
    options = scores.shape[-1]
    loads = options * F.one_hot(chosen, options).to(scores.dtype).mean(-2)
    return (loads * scores.mean(-2)).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """Mean of ``logsumexp(logits)²``, ``[B]``, of ``[B, T, ..., options]``: keeps logits small."""
    return logits.float().logsumexp(-1).square().flatten(1).mean(-1)


def moved_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """``b_i + u sign(mean(load) − load_i)``, ``[R]``: options that were chosen too often become less likely."""
    return bias + rate * (load.mean() - load).sign()


# --- Figures -------------------------------------------------------------------------------------------------------


@dataclass
class RouterFigures:
    """What routers did with the tokens of a batch that are learnt.

    Args:
        routing: Of the forward.
        keep: Bool ``[B, T]``: those tokens.
        capacities: What loads are compared with, by depth; None compares with equal shares.
    """

    routing: Routing
    keep: Tensor
    capacities: list[float] | None

    def loads(self) -> Tensor:
        """The part of the tokens that goes through each recursion, ``[R]``."""
        return torch.stack([(each & self.keep).sum() for each in self.routing.selected]) / self._count()

    def max_violation(self) -> Tensor:
        """The largest part by which a load is off: of each recursion, or in token choice of each choice of a depth."""
        loads = self.loads()
        if self.capacities is not None:
            wanted = torch.tensor(self.capacities[: len(loads)], device=loads.device)
        else:
            deeper = torch.cat([loads[1:], loads.new_zeros(1)])
            loads, wanted = loads - deeper, torch.full_like(loads, 1 / len(loads))
        return (loads / wanted - 1).abs().max()

    def dead(self, ids: Tensor, vocabulary: int) -> Tensor:
        """The part of the tokens of which no occurrence in the batch reaches the last recursion."""
        reached = torch.zeros(vocabulary, dtype=torch.bool, device=ids.device)
        reached[ids[self.routing.selected[-1] & self.keep]] = True
        return (~reached[ids] & self.keep).sum() / self._count()

    def sampling_accuracy(self, depth: int, *, training: bool, threshold: float) -> Tensor:
        """How often score and best ``k`` agree on a candidate."""
        assert self.capacities is not None
        routing = self.routing
        candidates = routing.candidates[depth]
        above = (routing.deciding or routing.logits)[depth].sigmoid() >= threshold
        if training:
            best = routing.selected[depth]
        else:
            best = choose_top_k(routing.logits[depth], candidates, self.capacities[depth])
        return ((above == best) & candidates).sum() / candidates.sum().clamp(min=1)

    def _count(self) -> Tensor:
        return self.keep.sum().clamp(min=1)


# --- The stage -----------------------------------------------------------------------------------------------------


class Routers(Heal):
    """The last recursion as in :class:`Heal`, every token going as deep as the routers send it.

    Expert choice adds ``router_weight`` times :func:`auxiliary_loss` of every depth; token choice
    ``router_balance_weight`` times :func:`balancing_loss`, or moves a bias on the choice after each step. When
    measuring, routers decide as in inference, so held-out figures are those of a causal model.
    """

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Add routers; a model that has those asked for keeps them, and what is not asked for stays as it is.

        Raises:
            SettingsError: The layout has no boundaries, or fields that do not go together.
        """
        settings, config = self.settings, model.config
        self._model, self._step = model, -1
        asked = {name: getattr(settings, name) for name in ROUTER_FIELDS if getattr(settings, name) is not None}
        if "router_capacities" in asked:
            asked["router_capacities"] = list(asked["router_capacities"])
        routers = model.model.routers
        if routers is not None and all(getattr(config, name) == value for name, value in asked.items()):
            return
        kind = cast(RouterKind, asked.pop("router", config.router or "expert_choice"))
        kept = {}
        if routers is not None:
            logger.warning("The model's %s routers are replaced by new %s ones.", config.router, kind)
            if kind == config.router:
                kept = {name: getattr(config, name) for name in ROUTER_FIELDS if name != "router"}
        try:
            model.add_routers(kind, **{**kept, **asked})
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        return {}

    def begin_step(self, step: int, max_steps: int) -> None:
        """Set the capacities of the step, and move the bias by the loads of the step before."""
        if step == self._step:
            return
        self._step = step
        config = self._model.config
        if config.router == "expert_choice":
            steps = self.settings.router_warmup_fraction * max_steps
            progress = step / steps if steps else 1.0
            self._model.model.training_capacities = [warmed_up(each, progress) for each in capacities_of(config)]
        self._move_bias()

    def settle(self, model: RecursiveForCausalLM, sequences: Callable[[int], list[Tensor]]) -> bool:
        """Choose the thresholds of expert choice, where a router has learnt anything that they could be for."""
        config = model.config
        learnt = config.router == "expert_choice" and config.router_width != "random"
        if not (self.settings.router_calibrate and learnt and min(capacities_of(config)) < 1):
            return False
        thresholds = calibrate_thresholds(model, sequences(CALIBRATION_TOKENS))
        logger.info("Thresholds of the routers: %s", ", ".join(f"{each:.3f}" for each in thresholds))
        return True

    def finish(self, model: RecursiveForCausalLM) -> None:
        model.model.training_capacities = None
        self._move_bias()

    def _move_bias(self) -> None:
        router = self._router()
        if router is None or self.settings.router_balance != "bias" or not router.load.any():
            return
        router.bias.copy_(moved_bias(router.bias, router.load, self.settings.router_bias_rate))
        router.load.zero_()

    def _router(self) -> TokenRouter | None:
        """The one of token choice."""
        routers = self._model.model.routers
        if routers is None or self._model.config.router != "token_choice":
            return None
        return cast(TokenRouter, routers[0])

    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        total, sums = super().__call__(model, outputs, inputs)
        routing = outputs.routing
        assert routing is not None, "prepare() adds routers"
        keep = F.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))
        # A row counts by its tokens that are learnt, so that rows add up over micro-batches and ranks.
        weights = keep.sum(-1)
        if model.training:
            for name, (weight, rows) in self._losses(model, routing).items():
                loss = (rows * weights).sum()
                total = total + weight * loss
                sums[name] = loss.detach()
            self._take_loads(routing)
        with torch.no_grad():
            figures = self._figures(model, routing, keep, inputs["input_ids"])
        return total, sums | {name: figure * weights.sum() for name, figure in figures.items()}

    def _losses(self, model: RecursiveForCausalLM, routing: Routing) -> dict[str, tuple[float, Tensor]]:
        """By name, weight and rows ``[B]``."""
        settings = self.settings
        losses: dict[str, tuple[float, Tensor]] = {}
        if model.config.router == "expert_choice":
            # A random router has nothing to learn.
            learns = model.config.router_width != "random" or bool(routing.deciding)
            if settings.router_weight and learns:
                taught = zip(routing.deciding or routing.logits, routing.selected, routing.candidates, strict=True)
                rows = torch.stack([auxiliary_loss(*each) for each in taught]).sum(0)
                losses["router_loss"] = settings.router_weight, rows
            logits = torch.stack(routing.logits, -1).unsqueeze(-1) if learns else None
        else:
            logits = routing.logits[0]
            if settings.router_balance == "loss":
                scores = activated(logits, activation_of(model.config))
                rows = balancing_loss(scores, routing.depths.clamp(min=0))
                losses["balancing_loss"] = settings.router_balance_weight, rows
        if settings.router_z_weight and logits is not None:
            losses["router_z_loss"] = settings.router_z_weight, z_loss(logits)
        return losses

    @torch.no_grad()
    def _take_loads(self, routing: Routing) -> None:
        """Count this micro-batch's choices, on all ranks: the same everywhere, and in a checkpoint."""
        router = self._router()
        if router is None or self.settings.router_balance != "bias":
            return
        chosen = routing.depths.flatten()
        load = torch.bincount(chosen[chosen >= 0], minlength=router.num_options).to(router.load.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        router.load += load

    def _figures(self, model: RecursiveForCausalLM, routing: Routing, keep: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """By name, a mean per token of the batch."""
        config = model.config
        capacities = None
        if config.router == "expert_choice":
            capacities = (model.training and model.model.training_capacities) or capacities_of(config)
        seen = RouterFigures(routing, keep, capacities)
        figures = {f"load_depth_{depth}": load for depth, load in enumerate(seen.loads())}
        figures["dead_tokens"] = seen.dead(ids, config.vocab_size)
        figures["max_violation"] = seen.max_violation()
        for depth, capacity in enumerate((capacities or ())[: len(routing.selected)]):
            if capacity < 1:
                threshold = 0.5 if config.router_thresholds is None else config.router_thresholds[depth]
                accuracy = seen.sampling_accuracy(depth, training=model.training, threshold=threshold)
                figures[f"sampling_accuracy_depth_{depth}"] = accuracy
        return figures
