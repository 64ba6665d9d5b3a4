"""Calibrated initialization: shared weights and residuals fitted on what the model computes, not on its weights alone.

Two passes over the text, each with one slot's dense layers and the hidden states in memory (docs/calibration.md):

1. **Share.** One cursor per recursion walks the dense model, so that the layers tied to a slot are met together. Their
   inputs' second moments give the norm in which shared weight and residuals are solved, together
   (:func:`~recursify.convert.low_rank.share_for_residuals`).
2. **Correct drift.** The converted model's own hidden states walk beside the dense ones. Each residual is refitted,
   stage by stage (q/k/v, o, gate/up, down), as the reduced-rank regression of the dense layer's outputs on the inputs
   that the converted layer really sees. Where the map writes to the residual stream, it is also asked to make up for
   what the stream has lost so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, load_tokenizer
from recursify.checkpoint.dense_names import DenseNames, StoredModule
from recursify.checkpoint.layerwise import Layerwise
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.evaluation.text import Text, token_windows
from recursify.progress import Progress

from .converter import write_factors
from .initialization import average
from .low_rank import WeightedNorm, regress, share, share_for_residuals
from .plan import ConversionPlan
from .relaxation import find_relaxation

Moments = dict[str, Tensor]
"""Second moments ``Σ x xᵀ [I, I]`` of a layer's linear maps' inputs, by the first path of each stage."""

MIN_WINDOWS = 2
"""Fewer windows than this say nothing about a model."""


class Calibration:
    """Fits the shared block of one conversion on text.

    Args:
        checkpoint: The dense model.
        plan: The plan, its ``auto`` resolved.
        text: What to calibrate on.
        progress: Told of every layer done.

    Raises:
        TextError: The text is too short.
        CheckpointError: The model has no tokenizer.
    """

    def __init__(self, checkpoint: DenseCheckpoint, plan: ConversionPlan, text: Text, progress: Progress):
        self.checkpoint = checkpoint
        self.layout = plan.layout
        self.names = DenseNames(plan.config)
        self.text = text
        self.progress = progress
        settings = plan.settings
        length = min(settings.calibration_length, plan.config.max_position_embeddings)
        self.windows = token_windows(
            load_tokenizer(checkpoint), text, length, max_tokens=settings.calibration_tokens, min_windows=MIN_WINDOWS
        )
        self.dense = Layerwise(checkpoint, plan.config, self.windows, settings.device)
        self._fisher: dict[str, Tensor] | None = None

    @torch.no_grad()
    def run(self, plan: ConversionPlan, output: ShardedCheckpoint) -> dict[str, Any]:
        """Make every shared weight and residual of ``plan`` and write them into ``output``.

        Returns:
            What was done, for the record.
        """
        starts, prelude = self._walk_to_starts()
        self._share(plan, output, starts)
        corrects = plan.has_residuals and find_relaxation(plan.settings.relaxation).needs_text
        corrects = corrects and plan.settings.drift_correction
        if corrects:
            self._correct_drift(output, prelude)
        return {
            "text": self.text.name,
            "num_tokens": self.windows.numel(),
            "window": self.windows.shape[1],
            "drift_correction": corrects,
        }

    # --- Pass 1: share -------------------------------------------------------------------------------------------

    def _walk_to_starts(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Dense hidden states where each cursor starts, and where the block does.

        In a cycle, cursor ``d`` starts at recursion ``d``; in a sequence one cursor meets all depths of a slot in turn.
        """
        layout = self.layout
        first_positions = [layout.position(0, depth) for depth in range(layout.num_recursions)]
        if layout.order == "sequence":
            first_positions = first_positions[:1]
        hidden = self.dense.embed()
        starts = []
        for position in range(first_positions[-1] + 1):
            if position in first_positions:
                starts.append(hidden)
            if position < first_positions[-1]:
                layer = self.dense.load(position)
                hidden = [self.dense.run(layer, position, batch) for batch in hidden]
                self.progress("walk", position + 1, first_positions[-1])
        return starts, starts[0]

    def _slots(
        self, starts: list[list[Tensor]], stage_name: str
    ) -> Iterator[tuple[int, list[nn.Module], list[Moments]]]:
        """Each slot with its dense layers by depth, and the second moments of their inputs."""
        cursors = list(starts)
        for index in range(self.layout.block_size):
            layers, moments = [], []
            for depth, position in enumerate(self.layout.positions(index)):
                cursor = 0 if self.layout.order == "sequence" else depth
                layer = self.dense.load(position)
                cursors[cursor], measured = self._run_and_measure(layer, position, cursors[cursor])
                layers.append(layer)
                moments.append(measured)
            yield index, layers, moments
            self.progress(stage_name, index + 1, self.layout.block_size)

    def _share(self, plan: ConversionPlan, output: ShardedCheckpoint, starts: list[list[Tensor]]) -> None:
        for index, layers, moments in self._slots(starts, "share"):
            modules = {module.path: module for module in self.names.stored_modules(index) if module.is_linear}
            for stage in self.dense.stages:
                metrics = [WeightedNorm(moment.pop(stage[0])) for moment in moments]
                for path in stage:
                    self._share_linear(plan, output, modules[path], layers, metrics)

    @torch.no_grad()
    def allocate_ranks(self, plan: ConversionPlan) -> ConversionPlan:
        """The plan with its residuals' parameters spent where they remove most error, if it asks for that.

        Each further rank of a module costs ``R (I + O)`` parameters and removes the next singular values of what
        sharing costs its depths: ``tail`` takes them in the metric of the module's inputs, relative to the energy of
        its output; ``fisher`` takes plain ones times the matrix's mean curvature, an estimate of the loss. Ranks are
        bought in order of gain per parameter until the uniform allocation's budget is spent.
        """
        allocation = plan.settings.rank_allocation
        if allocation == "uniform" or not plan.has_residuals:
            return plan
        starts, _ = self._walk_to_starts()
        gains: dict[str, Tensor] = {}
        costs: dict[str, int] = {}
        budget = 0
        for index, layers, moments in self._slots(starts, "allocate"):
            modules = {module.path: module for module in self.names.stored_modules(index) if module.is_linear}
            for stage in self.dense.stages:
                metrics = [WeightedNorm(moment.pop(stage[0])) for moment in moments]
                for path in stage:
                    weights = [_weight(layer, path).cpu() for layer in layers]
                    key = f"{index}.{path}"
                    if allocation == "fisher":
                        curvatures = self._curvatures(modules[path])
                        gains[key] = _plain_gains(weights, [float(curvature.mean()) for curvature in curvatures])
                    else:
                        gains[key] = _weighted_gains(weights, metrics)
                    costs[key] = len(weights) * sum(weights[0].shape)
                    budget += modules[path].rank * costs[key]
        plan = plan.with_rank_pattern(_spend(gains, costs, budget))
        self.names = DenseNames(plan.config)
        return plan

    def _run_and_measure(self, layer: nn.Module, position: int, hidden: list[Tensor]) -> tuple[list[Tensor], Moments]:
        """A layer's outputs over the whole text, and the second moments of its linear maps' inputs."""
        firsts = [stage[0] for stage in self.dense.stages]
        outputs: list[Tensor] = []
        totals: Moments = {}
        for batch in hidden:
            output, fed = self.dense.observe(layer, position, batch, firsts)
            outputs.append(output)
            for path, rows in fed.items():
                totals[path] = totals.get(path, 0) + _products(rows, rows)
        return outputs, totals

    def _share_linear(
        self,
        plan: ConversionPlan,
        output: ShardedCheckpoint,
        module: StoredModule,
        layers: list[nn.Module],
        metrics: list[WeightedNorm],
    ) -> None:
        """Write the shared weight of one module, and its residuals against what then lies on disk."""
        weights = [_weight(layer, module.path).cpu() for layer in layers]
        settings = plan.settings
        calibrated_residuals = find_relaxation(settings.relaxation).needs_text and module.rank > 0
        if settings.initialization == "calibrated":
            shared = (
                share_for_residuals(weights, metrics, module.rank) if calibrated_residuals else share(weights, metrics)
            )
        elif settings.initialization == "fisher":
            shared = average(weights, self._curvatures(module))
        else:
            sources = plan.sources[module.index]
            shared = average([self.checkpoint.read(self.names.dense(p, module.path, "weight")) for p in sources])
        output.write(f"{module.name}.linear.weight", shared)
        if not module.rank:
            return
        on_disk = output.read(f"{module.name}.linear.weight").float()
        factors = find_relaxation(settings.relaxation).factors
        generator = torch.Generator().manual_seed(settings.seed)
        pairs = [
            metric.low_rank(weight - on_disk, module.rank)
            if factors is None
            else factors(weight - on_disk, module.rank, generator)
            for weight, metric in zip(weights, metrics, strict=True)
        ]
        write_factors(output, module, pairs)

    def _curvatures(self, module: StoredModule) -> list[Tensor]:
        """Fisher information of a module's dense weights, by depth, each ``[O, I]``."""
        positions = self.layout.positions(module.index)
        return [self._fisher_information()[self.names.dense(p, module.path, "weight")] for p in positions]

    def _fisher_information(self) -> dict[str, Tensor]:
        """Diagonal Fisher information of every dense linear weight: mean squared gradient over windows of the text.

        Unlike the rest of the calibration this holds the whole dense model, its gradients and their squares.
        """
        if self._fisher is None:
            model = self.checkpoint.load_model(torch.float32)
            linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            watched = {n: p for n, p in model.named_parameters() if n in linears and n.startswith(self.names.stem)}
            self._fisher = {name: torch.zeros_like(parameter) for name, parameter in watched.items()}
            with torch.enable_grad():
                for done, window in enumerate(self.windows):
                    model.zero_grad()
                    model(window[None], labels=window[None]).loss.backward()
                    for name, parameter in watched.items():
                        assert parameter.grad is not None
                        self._fisher[name] += parameter.grad.square() / len(self.windows)
                    self.progress("fisher", done + 1, len(self.windows))
        return self._fisher

    # --- Pass 2: correct drift -----------------------------------------------------------------------------------

    def _correct_drift(self, output: ShardedCheckpoint, start: list[Tensor]) -> None:
        layout = self.layout
        dense_hidden, own_hidden = start, start
        first = layout.num_prelude_layers
        # The coda stays as it is: refitted in full on 16k tokens it learned the text, and held-out perplexity on
        # SmolLM2-135M rose from 22.2 to 23.2.
        last = layout.num_layers - layout.num_coda_layers - 1
        for position in range(first, last + 1):
            slot = layout.layer_ref(position)
            dense_layer = self.dense.load(position)
            own_layer = self._converted(output, position)
            modules = {module.path: module for module in self.names.stored_modules(slot.index)}
            for index, stage in enumerate(self.dense.stages):
                evidence = self._evidence(dense_layer, own_layer, position, dense_hidden, own_hidden, index)
                for path in stage:
                    wanted = regress(_weight(dense_layer, path).cpu(), evidence.cross, evidence.metric, evidence.drift)
                    self._refit_residual(output, modules[path], slot.depth, wanted, evidence.metric)
                    # The next stage runs through it.
                    _weight(own_layer, path).copy_(self._merged(output, modules[path], slot.depth))
            if position < last:
                dense_hidden = [self.dense.run(dense_layer, position, batch) for batch in dense_hidden]
                own_hidden = [self.dense.run(own_layer, position, batch) for batch in own_hidden]
            self.progress("correct", position - first + 1, last - first + 1)

    def _converted(self, output: ShardedCheckpoint, position: int) -> nn.Module:
        """The converted layer at ``position`` as a dense one: weights merged, norms as written."""
        slot = self.layout.layer_ref(position)
        layer = self.dense.load(position)
        for module in self.names.stored_modules(slot.index):
            for parameter in module.parameters:
                if module.is_linear and parameter == "weight":
                    _weight(layer, module.path).copy_(self._merged(output, module, slot.depth))
                elif module.is_linear:
                    biases = output.read(f"{module.name}.bias")
                    layer.get_parameter(f"{module.path}.bias").copy_(biases[slot.depth % len(biases)])
                else:
                    tied = f"{module.name}.copies.{slot.depth}.{parameter}" not in output.tensors
                    depth = 0 if tied else slot.depth
                    layer.get_parameter(f"{module.path}.{parameter}").copy_(
                        output.read(f"{module.name}.copies.{depth}.{parameter}")
                    )
        return layer

    @staticmethod
    def _merged(output: ShardedCheckpoint, module: StoredModule, depth: int) -> Tensor:
        weight = output.read(f"{module.name}.linear.weight").float()
        if module.rank:
            left = output.read(f"{module.name}.lora_b")[depth].float()
            right = output.read(f"{module.name}.lora_a")[depth].float()
            weight += left @ right
        return weight

    def _evidence(
        self,
        dense_layer: nn.Module,
        own_layer: nn.Module,
        position: int,
        dense_hidden: list[Tensor],
        own_hidden: list[Tensor],
        stage: int,
    ) -> RegressionMoments:
        """Run both layers up to a stage over the whole text."""
        moment = cross = drift = torch.zeros(())
        for theirs, mine in zip(dense_hidden, own_hidden, strict=True):
            y, their_stream = self.dense.input_and_rest(dense_layer, position, theirs, stage)
            x, my_stream = self.dense.input_and_rest(own_layer, position, mine, stage)
            moment = moment + _products(x, x)
            cross = cross + _products(y, x)
            if their_stream is not None and my_stream is not None:
                drift = drift + _products(their_stream - my_stream, x)
        return RegressionMoments(WeightedNorm(moment), cross, drift if self.dense.writes[stage] else None)

    @staticmethod
    def _refit_residual(
        output: ShardedCheckpoint, module: StoredModule, depth: int, wanted: Tensor, metric: WeightedNorm
    ) -> None:
        """Give one depth the residual that is nearest to the map ``wanted [O, I]``."""
        if not module.rank:
            return
        shared = output.read(f"{module.name}.linear.weight").double()
        left, right = metric.low_rank(wanted - shared, module.rank)
        for name, factor in ((f"{module.name}.lora_b", left), (f"{module.name}.lora_a", right)):
            stacked = output.read(name)
            stacked[depth] = factor.to(stacked.dtype)
            output.write(name, stacked)


@dataclass(frozen=True)
class RegressionMoments:
    """What a residual is refitted on; ``x`` are the converted layer's inputs at a stage, ``y`` the dense one's.

    Attributes:
        metric: The metric of ``Σ x xᵀ``.
        cross: ``Σ y xᵀ``, ``[I, I]``.
        drift: ``Σ (s_dense − s_own) xᵀ``, ``[D, I]``, where the stage adds to a residual stream ``s``: a map that
            writes there can take back what earlier layers got wrong. None elsewhere.
    """

    metric: WeightedNorm
    cross: Tensor
    drift: Tensor | None


def _weighted_gains(weights: list[Tensor], metrics: list[WeightedNorm]) -> Tensor:
    """What each rank of all depths' residuals removes, as a fraction of the energy of the output: ``[min(O, I)]``."""
    shared = share(weights, metrics)
    tails = [m.tail(w.double() - shared) / m.error(w) for w, m in zip(weights, metrics, strict=True)]
    return torch.stack(tails).sum(dim=0)


def _plain_gains(weights: list[Tensor], curvatures: list[float]) -> Tensor:
    """The same in plain Frobenius norm, times each depth's mean curvature: ``[min(O, I)]``."""
    shared = average(weights)
    tails = [c * torch.linalg.svdvals(w - shared).square() for w, c in zip(weights, curvatures, strict=True)]
    return torch.stack(tails).sum(dim=0)


def _spend(gains: dict[str, Tensor], costs: dict[str, int], budget: int) -> dict[str, int]:
    """Ranks by module, at least 1 each: the best gains per parameter that ``budget`` parameters buy."""
    ranks = dict.fromkeys(gains, 1)
    left = budget - sum(costs.values())
    offers = sorted(((float(gain) / costs[key], key) for key, tail in gains.items() for gain in tail[1:]), reverse=True)
    for _, key in offers:
        if costs[key] <= left:
            ranks[key] += 1
            left -= costs[key]
    return ranks


def _weight(layer: nn.Module, path: str) -> Tensor:
    return layer.get_parameter(f"{path}.weight")


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ l rᵀ`` over rows ``[n, I]``: products in float32, to be summed in float64. ``[I, I]``."""
    return (left.mT @ right).double().cpu()
