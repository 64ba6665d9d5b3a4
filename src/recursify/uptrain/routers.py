"""Stage ``routers``: train routers that choose which tokens run which recursions, and the model with them."""

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
from .heal import Heal
from .losses import Sums
from .settings import ROUTER_FIELDS

logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 4096
"""Number of training tokens for calibrating thresholds; the standard error of a load of one half is then about 1 %."""


# --- Losses: means over the tokens of a sequence, ``[B]`` ----------------------------------------------------------


def auxiliary_loss(logits: Tensor, selected: Tensor, candidates: Tensor) -> Tensor:
    """Binary cross-entropy of ``sigmoid(logit)`` with membership in the top ``k``, ``[B]``.

    It pushes scores to both sides of 0.5, the threshold of inference, which cannot see later tokens (MoR, arXiv
    2507.10524, section 2.2.1).

    Args:
        logits: Router logits ``[B, T]``.
        selected: Tokens in the top ``k``, bool ``[B, T]``.
        candidates: Tokens to average over, bool ``[B, T]``.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), selected.float(), reduction="none")
    return (losses * candidates).sum(-1) / candidates.sum(-1).clamp(min=1)


def balancing_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """``Σ_i f_i P_i``, ``f_i = (R/T) #{t: chosen_t = i}`` and ``P_i`` the mean score, ``[B]``; 1 at perfect balance.

    Args:
        scores: Activated scores ``[B, T, R]``, which get the gradient.
        chosen: Chosen depths ``[B, T]``.
    """
    options = scores.shape[-1]
    loads = options * F.one_hot(chosen, options).to(scores.dtype).mean(-2)
    return (loads * scores.mean(-2)).sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """Mean of ``logsumexp(logits)²``, ``[B]``, for logits ``[B, T, ..., options]``; keeps logits small."""
    return logits.float().logsumexp(-1).square().flatten(1).mean(-1)


def updated_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """``b_i + u sign(mean(load) − load_i)``, ``[R]``: options that were chosen too often become less likely."""
    return bias + rate * (load.mean() - load).sign()


# --- Figures -------------------------------------------------------------------------------------------------------


@dataclass
class RouterFigures:
    """Statistics of the routing of a batch.

    Attributes:
        routing: Routing of the forward.
        keep: Tokens that count, bool ``[B, T]``.
        capacities: Target load by depth; None for equal shares.
    """

    routing: Routing
    keep: Tensor
    capacities: list[float] | None

    def loads(self) -> Tensor:
        """Fraction of the tokens that runs each recursion, ``[R]``."""
        return torch.stack([(selected & self.keep).sum() for selected in self.routing.selected]) / self._count()

    def max_violation(self) -> Tensor:
        """Largest relative deviation of a load from its target: of a recursion, or for token choice of a depth."""
        loads = self.loads()
        if self.capacities is not None:
            targets = torch.tensor(self.capacities[: len(loads)], device=loads.device)
        else:
            deeper = torch.cat([loads[1:], loads.new_zeros(1)])
            loads, targets = loads - deeper, torch.full_like(loads, 1 / len(loads))
        return (loads / targets - 1).abs().max()

    def dead_tokens(self, ids: Tensor, vocab_size: int) -> Tensor:
        """Fraction of the tokens whose id never reaches the last recursion in this batch."""
        reached = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
        reached[ids[self.routing.selected[-1] & self.keep]] = True
        return (~reached[ids] & self.keep).sum() / self._count()

    def sampling_accuracy(self, depth: int, *, training: bool, threshold: float) -> Tensor:
        """Fraction of the candidates for which the threshold and the top ``k`` decide alike."""
        assert self.capacities is not None
        routing = self.routing
        candidates = routing.candidates[depth]
        above = (routing.deciding or routing.logits)[depth].sigmoid() >= threshold
        if training:
            top_k = routing.selected[depth]
        else:
            top_k = choose_top_k(routing.logits[depth], candidates, self.capacities[depth])
        return ((above == top_k) & candidates).sum() / candidates.sum().clamp(min=1)

    def _count(self) -> Tensor:
        return self.keep.sum().clamp(min=1)


# --- The stage -----------------------------------------------------------------------------------------------------


class Routers(Heal):
    """The loss of :class:`Heal`, with every token at the depth that the routers choose, and the losses of the routers.

    Expert choice adds ``router_weight`` times :func:`auxiliary_loss` of every depth; token choice adds
    ``router_balance_weight`` times :func:`balancing_loss`, or updates a bias on the choice after each step. In
    evaluations routers decide as in inference, so held-out figures are those of a causal model.
    """

    trained_parts = frozenset({"routers"})

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Add routers, unless the model has routers like these; settings that are None keep the model's value.

        Raises:
            SettingsError: The layout has no boundaries, or settings contradict each other.
        """
        settings, config = self.settings, model.config
        self._model, self._step = model, -1
        fields = {name: getattr(settings, name) for name in ROUTER_FIELDS if getattr(settings, name) is not None}
        if "router_capacities" in fields:
            fields["router_capacities"] = list(fields["router_capacities"])
        routers = model.model.routers
        if routers is not None and all(getattr(config, name) == value for name, value in fields.items()):
            return
        kind = cast(RouterKind, fields.pop("router", config.router or "expert_choice"))
        defaults = {}
        if routers is not None:
            logger.warning("The model's %s routers are replaced by new %s ones.", config.router, kind)
            if kind == config.router:
                defaults = {name: getattr(config, name) for name in ROUTER_FIELDS if name != "router"}
        try:
            model.add_routers(kind, **{**defaults, **fields})
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        return {}

    def begin_step(self, step: int, max_steps: int) -> None:
        """Set the capacities of the step, and update the bias by the loads of the step before."""
        if step == self._step:
            return
        self._step = step
        config = self._model.config
        if config.router == "expert_choice":
            steps = self.settings.router_warmup_fraction * max_steps
            progress = step / steps if steps else 1.0
            capacities = [warmed_up(capacity, progress) for capacity in capacities_of(config)]
            self._model.model.training_capacities = capacities
        self._update_bias()

    def calibrate(self, model: RecursiveForCausalLM, sequences: Callable[[int], list[Tensor]]) -> bool:
        """Choose the thresholds of expert choice, unless routers are random or capacities are 1."""
        config = model.config
        is_learned = config.router == "expert_choice" and config.router_width != "random"
        if not (self.settings.router_calibrate and is_learned and min(capacities_of(config)) < 1):
            return False
        thresholds = calibrate_thresholds(model, sequences(CALIBRATION_TOKENS))
        logger.info("Thresholds of the routers: %s", ", ".join(f"{threshold:.3f}" for threshold in thresholds))
        return True

    def finish(self, model: RecursiveForCausalLM) -> None:
        model.model.training_capacities = None
        self._update_bias()

    def _update_bias(self) -> None:
        router = self._biased_router()
        if router is not None and router.load.any():
            router.bias.copy_(updated_bias(router.bias, router.load, self.settings.router_bias_rate))
            router.load.zero_()

    def _biased_router(self) -> TokenRouter | None:
        """The router of token choice, if it is balanced by a bias."""
        routers = self._model.model.routers
        if routers is None or self._model.config.router != "token_choice" or self.settings.router_balance != "bias":
            return None
        return cast(TokenRouter, routers[0])

    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        total, sums = super().__call__(model, outputs, inputs)
        routing = outputs.routing
        assert routing is not None, "prepare() adds routers"
        keep = F.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))
        # Rows are weighted by their predicted tokens, so that sums over micro-batches and ranks are right.
        weights = keep.sum(-1)
        if model.training:
            for name, (weight, rows) in self._losses(model, routing).items():
                loss = (rows * weights).sum()
                total = total + weight * loss
                sums[name] = loss.detach()
            self._add_loads(routing)
        with torch.no_grad():
            figures = self._figures(model, routing, keep, inputs["input_ids"])
        return total, sums | {name: figure * weights.sum() for name, figure in figures.items()}

    def _losses(self, model: RecursiveForCausalLM, routing: Routing) -> dict[str, tuple[float, Tensor]]:
        """Mapping from names to weights and losses ``[B]``."""
        settings = self.settings
        losses: dict[str, tuple[float, Tensor]] = {}
        if model.config.router == "expert_choice":
            # A random router is not trained.
            is_trained = model.config.router_width != "random" or bool(routing.deciding)
            if settings.router_weight and is_trained:
                depths = zip(routing.deciding or routing.logits, routing.selected, routing.candidates, strict=True)
                rows = torch.stack([auxiliary_loss(*arguments) for arguments in depths]).sum(0)
                losses["router_loss"] = settings.router_weight, rows
            logits = torch.stack(routing.logits, -1).unsqueeze(-1) if is_trained else None
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
    def _add_loads(self, routing: Routing) -> None:
        """Add the choices in this micro-batch, over all ranks, to the router's buffer, which checkpoints contain."""
        router = self._biased_router()
        if router is None:
            return
        chosen = routing.depths.flatten()
        load = torch.bincount(chosen[chosen >= 0], minlength=router.num_options).to(router.load.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        router.load += load

    def _figures(self, model: RecursiveForCausalLM, routing: Routing, keep: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Mapping from names to means per token of the batch."""
        config = model.config
        capacities = None
        if config.router == "expert_choice":
            capacities = (model.training and model.model.training_capacities) or capacities_of(config)
        statistics = RouterFigures(routing, keep, capacities)
        figures = {f"load_depth_{depth}": load for depth, load in enumerate(statistics.loads())}
        figures["dead_tokens"] = statistics.dead_tokens(ids, config.vocab_size)
        figures["max_violation"] = statistics.max_violation()
        for depth, capacity in enumerate((capacities or ())[: len(routing.selected)]):
            if capacity < 1:
                threshold = 0.5 if config.router_thresholds is None else config.router_thresholds[depth]
                accuracy = statistics.sampling_accuracy(depth, training=model.training, threshold=threshold)
                figures[f"sampling_accuracy_depth_{depth}"] = accuracy
        return figures
