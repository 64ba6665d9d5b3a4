"""Calibrated initialization: shared weights and residuals fitted to the model's activations on a text.

Two passes over the text, each with one tied group's dense layers and the hidden states in memory (docs/calibration.md):

1. **Share.** One cursor per recursion walks the dense model, so that the layers of a tied group are loaded together.
   The second moments of their inputs define the norm in which shared weight and residuals are solved jointly
   (:func:`~recursify.convert.low_rank.share_for_residuals`).
2. **Correct drift.** The converted model's hidden states are computed next to the dense ones. Each residual is
   refitted, stage by stage (q/k/v, o, gate/up, down), by reduced-rank regression of the dense layer's outputs on the
   converted layer's inputs. Where a map writes to the residual stream, its target includes the stream's error so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, load_tokenizer
from recursify.checkpoint.dense_names import Factors, StoredModule
from recursify.checkpoint.layerwise import TOKENS_PER_BATCH, Layerwise
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.evaluation.text import Text, num_context, text_start, token_windows
from recursify.progress import Progress

from .fisher import fisher_information
from .initialization import average
from .low_rank import TiedNorms, WeightedNorm, regress, share, share_for_residuals
from .plan import ConversionPlan, find_rank_allocation
from .relaxation import find_relaxation

MIN_WINDOWS = 2
"""Smallest number of token windows that calibration accepts."""


@dataclass(frozen=True)
class TiedLinears:
    """Dense weights ``[O, I]`` (float32, on the CPU) that share one linear map, and norms of their inputs, by depth."""

    module: StoredModule
    weights: list[Tensor]
    norms: TiedNorms


@dataclass(frozen=True)
class StageInputs:
    """Inputs ``[n, I]`` of a layer's stage on a text, and the residual stream ``[n, D]`` that it writes to, if any."""

    inputs: Tensor
    stream: Tensor | None


class Calibration:
    """Fit of one conversion's shared block to a text.

    Raises:
        TextError: The text is too short.
        CheckpointError: The model has no tokenizer.
    """

    def __init__(self, checkpoint: DenseCheckpoint, plan: ConversionPlan, text: Text, progress: Progress):
        self.checkpoint = checkpoint
        self.plan = plan
        self.layout = plan.layout
        self.generator = torch.Generator().manual_seed(plan.settings.seed)
        self.text = text
        self.progress = progress
        settings = plan.settings
        length = min(settings.calibration_length, plan.config.max_position_embeddings)
        self.tokenizer = load_tokenizer(checkpoint)
        self.windows = token_windows(
            self.tokenizer,
            text,
            length,
            max_tokens=settings.calibration_tokens,
            min_windows=MIN_WINDOWS,
            vocab_size=plan.config.vocab_size,
        )
        self.dense = Layerwise(checkpoint, plan.config, self.windows, settings.device)

    @torch.no_grad()
    def allocate_ranks(self) -> ConversionPlan:
        """Apply the rank allocation of the settings, by default none; returns the plan to carry out."""
        allocate = find_rank_allocation(self.plan.settings.rank_allocation)
        if allocate is not None and self.plan.has_residuals:
            self.plan = self.plan.with_rank_pattern(allocate(self))
        return self.plan

    @torch.no_grad()
    def run(self, output: ShardedCheckpoint) -> dict[str, Any]:
        """Fit and write every shared weight and residual; returns the entry ``calibration`` of ``recursify.json``."""
        starts = self._walk_to_starts()
        for linears in self._tied_linears(starts, "share"):
            self._write_linears(output, linears)
        corrects_drift = (
            self.plan.settings.drift_correction
            and self.plan.has_residuals
            and find_relaxation(self.plan.settings.relaxation).needs_text
        )
        if corrects_drift:
            self._correct_drift(output, starts[0])
        return {
            "text": self.text.name,
            "num_tokens": self.windows.numel(),
            "window": self.windows.shape[1],
            "window_start": self.tokenizer.convert_ids_to_tokens(text_start(self.tokenizer)),
            "drift_correction": corrects_drift,
        }

    def tied_linears(self, stage_name: str) -> Iterator[TiedLinears]:
        """Tied linear maps of the shared block with their input norms; ``stage_name`` is for progress."""
        return self._tied_linears(self._walk_to_starts(), stage_name)

    def curvatures(self, module: StoredModule) -> list[Tensor]:
        """Fisher information of a module's dense weights by depth, each ``[O, I]``."""
        positions = self.layout.positions(module.index)
        return [self._fisher[self.plan.names.dense(position, module.path, "weight")] for position in positions]

    @cached_property
    def _fisher(self) -> dict[str, Tensor]:
        return fisher_information(
            self.checkpoint, self.plan.names.stem, self.windows, num_context(self.tokenizer), self.progress
        )

    # --- Pass 1: share -------------------------------------------------------------------------------------------

    def _walk_to_starts(self) -> list[list[Tensor]]:
        """Dense hidden states at the start of each cursor; the first one starts where the block does.

        In a cycle, cursor ``d`` starts at recursion ``d``; in a sequence one cursor visits all depths of a tied group
        in turn.
        """
        first_positions = self.layout.positions(0)
        if self.layout.order == "sequence":
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
        return starts

    def _tied_linears(self, starts: list[list[Tensor]], stage_name: str) -> Iterator[TiedLinears]:
        cursors = list(starts)
        for index in range(self.layout.block_size):
            layers, moments = [], []
            for depth, position in enumerate(self.layout.positions(index)):
                cursor = 0 if self.layout.order == "sequence" else depth
                layer = self.dense.load(position)
                cursors[cursor], input_moments = self._run_and_measure(layer, position, cursors[cursor])
                layers.append(layer)
                moments.append(input_moments)
            modules = {module.path: module for module in self.plan.names.stored_modules(index) if module.is_linear}
            for stage in self.dense.stages:
                norms = TiedNorms(WeightedNorm(moment.pop(stage[0])) for moment in moments)
                for path in stage:
                    yield TiedLinears(modules[path], [_weight(layer, path).cpu() for layer in layers], norms)
            self.progress(stage_name, index + 1, self.layout.block_size)

    def _run_and_measure(
        self, layer: nn.Module, position: int, hidden: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs of a layer, and second moments ``Σ x xᵀ [I, I]`` of the inputs by the first path of each stage."""
        paths = [stage[0] for stage in self.dense.stages]
        outputs: list[Tensor] = []
        moments: dict[str, Tensor] = {}
        for batch in hidden:
            output, inputs = self.dense.observe(layer, position, batch, paths)
            outputs.append(output)
            for path, rows in inputs.items():
                moments[path] = moments.get(path, 0) + _sum_of_products(rows, rows)
        return outputs, moments

    def _write_linears(self, output: ShardedCheckpoint, linears: TiedLinears) -> None:
        """Write one shared weight, and the residuals of the weight as it was rounded on disk."""
        module, weights, norms = linears.module, linears.weights, linears.norms
        settings = self.plan.settings
        factors = find_relaxation(settings.relaxation).factors

        def fit(depth: int, residual: Tensor, rank: int) -> Factors:
            if factors is None:
                return norms[depth].low_rank(residual, rank)
            return factors(residual, rank, self.generator)

        if settings.initialization == "calibrated":
            fits_residuals = factors is None and module.rank > 0
            shared = share_for_residuals(weights, norms, module.rank) if fits_residuals else share(weights, norms)
        elif settings.initialization == "fisher":
            shared = average(weights, self.curvatures(module))
        else:
            shared = self.plan.initial_weight(self.checkpoint, module, self.generator)
        module.write_linear(output, shared, weights, fit)

    # --- Pass 2: correct drift -----------------------------------------------------------------------------------

    def _correct_drift(self, output: ShardedCheckpoint, start: list[Tensor]) -> None:
        layout = self.layout
        # The whole text at once: a stage is refitted, and the layer goes on with what it was refitted to.
        dense_hidden = hidden = torch.cat(start)
        first = layout.num_prelude_layers
        # The coda is not refitted: refitted at full rank it learns the calibration text, and held-out perplexity rises.
        last = layout.num_layers - layout.num_coda_layers - 1
        for position in range(first, last + 1):
            dense, converted = self.dense.load(position), self._load_converted(output, position)
            seen: dict[int, StageInputs] = {}

            def record(stage: int, inputs: Tensor, stream: Tensor | None, seen: Any = seen) -> None:
                seen[stage] = StageInputs(inputs, stream)

            dense_hidden = self.dense.run_in_stages(dense, position, dense_hidden, record)
            refit = partial(self._refit_stage, output, (dense, converted), position, seen)
            hidden = self.dense.run_in_stages(converted, position, hidden, refit)
            self.progress("correct", position - first + 1, last - first + 1)

    def _refit_stage(
        self,
        output: ShardedCheckpoint,
        layers: tuple[nn.Module, nn.Module],
        position: int,
        seen: dict[int, StageInputs],
        stage: int,
        inputs: Tensor,
        stream: Tensor | None,
    ) -> None:
        """Refit the residuals of a stage of the converted layer, given its inputs and the dense layer's."""
        dense, ref = seen.pop(stage), self.layout.layer_ref(position)
        modules = {module.path: module for module in self.plan.names.stored_modules(ref.index)}
        paths = [path for path in self.dense.stages[stage] if modules[path].rank]
        if not paths:
            return
        norm = WeightedNorm(_sum_of_products(inputs, inputs))
        cross, drift = _sum_of_products(dense.inputs, inputs), None
        if dense.stream is not None and stream is not None:
            drift = _sum_of_products(dense.stream - stream, inputs)
        for path in paths:
            module = modules[path]
            target = regress(_weight(layers[0], path).cpu(), cross, norm, drift)
            shared = output.read(module.shared_weight).double()
            module.rewrite_factors(output, ref.depth, norm.low_rank(target - shared, module.rank))
            _weight(layers[1], path).copy_(module.read(output, "weight", ref.depth))

    def _load_converted(self, output: ShardedCheckpoint, position: int) -> nn.Module:
        """Load the converted layer at ``position`` as a dense one: residuals merged, norms as written."""
        ref = self.layout.layer_ref(position)
        layer = self.dense.load(position)
        for module in self.plan.names.stored_modules(ref.index):
            for parameter in module.parameters:
                stored = module.read(output, parameter, ref.depth)
                layer.get_parameter(f"{module.path}.{parameter}").copy_(stored)
        return layer


def _weight(layer: nn.Module, path: str) -> Tensor:
    return layer.get_parameter(f"{path}.weight")


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """``Σ l rᵀ`` over rows ``[n, I]``, ``[I, I]``: products in float32, summed over batches in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for some, others in zip(left.split(TOKENS_PER_BATCH), right.split(TOKENS_PER_BATCH), strict=True):
        total = total + (some.mT @ others).double().cpu()
    return total
