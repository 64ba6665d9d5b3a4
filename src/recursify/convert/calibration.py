"""Calibrated initialization: shared weights and residuals fitted to the model's activations on a text.

Two passes over the text, each with one tied group's dense layers and the hidden states in memory (docs/calibration.md):

1. **Share.** One cursor per recursion walks the dense model, so that the layers of a tied group are loaded together.
   The second moments of their inputs define the norm in which shared weight and residuals are solved jointly
   (:func:`~recursify.convert.sharing.share_for_residuals`). If drift correction follows, the first ``SHARE_TOKENS``
   tokens are enough, and the residuals are left to it.
2. **Correct drift.** The converted model's hidden states are computed next to the dense ones. Each residual is
   fitted, stage by stage (q/k/v, o, gate/up, down), by reduced-rank regression of the dense layer's outputs on the
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
from recursify.checkpoint.dense_names import Factors, StoredModule, merge_factors
from recursify.checkpoint.layerwise import Layerwise
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.evaluation.text import Text, num_context, text_start, token_windows
from recursify.progress import Progress

from .fisher import fisher_information
from .initialization import average
from .plan import ConversionPlan, find_rank_allocation
from .relaxation import find_relaxation
from .sharing import share, share_for_residuals
from .weighted_norm import TiedNorms, WeightedNorm, input_norm, second_moment

MIN_WINDOWS = 2
"""Smallest number of token windows that calibration accepts."""

SHARE_TOKENS = 4096
"""Number of tokens that shared weights are fitted to where drift correction fits the residuals to all."""


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
        self.dense = Layerwise(checkpoint, plan.config, settings.device)

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
        share_windows = self.windows
        if self.corrects_drift:
            share_windows = share_windows[: max(MIN_WINDOWS, SHARE_TOKENS // share_windows.shape[1])]
        for linears in self._tied_linears(share_windows, "share"):
            self._write_linears(output, linears)
        if self.corrects_drift:
            self._correct_drift(output)
        return {
            "text": self.text.name,
            "num_tokens": self.windows.numel(),
            "window": self.windows.shape[1],
            "window_start": self.tokenizer.convert_ids_to_tokens(text_start(self.tokenizer)),
            "drift_correction": self.corrects_drift,
        }

    @property
    def corrects_drift(self) -> bool:
        """Drift correction fits the residuals."""
        settings = self.plan.settings
        fits_residuals = self.plan.has_residuals and find_relaxation(settings.relaxation).needs_text
        return settings.drift_correction and fits_residuals

    def tied_linears(self, stage_name: str) -> Iterator[TiedLinears]:
        """Tied linear maps of the shared block with their input norms; ``stage_name`` is for progress."""
        return self._tied_linears(self.windows, stage_name)

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

    def _walk_to_starts(self, windows: Tensor) -> list[list[Tensor]]:
        """Dense hidden states at the start of each cursor; the first one starts where the block does.

        In a cycle, cursor ``d`` starts at recursion ``d``; in a sequence one cursor visits all depths of a tied group
        in turn.
        """
        first_positions = self.layout.positions(0)
        if self.layout.order == "sequence":
            first_positions = first_positions[:1]
        hidden = self.dense.embed(windows)
        starts = []
        for position in range(first_positions[-1] + 1):
            if position in first_positions:
                starts.append(hidden)
            if position < first_positions[-1]:
                hidden = self._walk(position, hidden)
                self.progress("walk", position + 1, first_positions[-1])
        return starts

    def _walk(self, position: int, hidden: list[Tensor]) -> list[Tensor]:
        layer = self.dense.load(position)
        return [self.dense.run(layer, position, batch) for batch in hidden]

    def _tied_linears(self, windows: Tensor, stage_name: str) -> Iterator[TiedLinears]:
        cursors = self._walk_to_starts(windows)
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
                    yield TiedLinears(modules[path], [_weight(layer, path) for layer in layers], norms)
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
                moments[path] = moments.get(path, 0) + second_moment(rows)
        return outputs, moments

    def _write_linears(self, output: ShardedCheckpoint, linears: TiedLinears) -> None:
        """Write one shared weight, and the residuals, unless drift correction does."""
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
        if self.corrects_drift:
            output.write(module.shared_weight, shared)
        else:
            module.write_linear(output, shared, weights, fit)

    # --- Pass 2: correct drift -----------------------------------------------------------------------------------

    def _correct_drift(self, output: ShardedCheckpoint) -> None:
        layout = self.layout
        first = layout.num_prelude_layers
        # The coda is not refitted: refitted at full rank it learns the calibration text, and held-out perplexity rises.
        last = layout.num_layers - layout.num_coda_layers - 1
        start = self.dense.embed(self.windows)
        for position in range(first):
            start = self._walk(position, start)
        # The whole text at once: a stage is refitted, and the layer goes on with what it was refitted to.
        dense_hidden = hidden = torch.cat(start)
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
        """Fit the residuals of a stage of the converted layer, given its inputs and the dense layer's.

        The target is the map ``M`` nearest to ``W`` of ``min Σ ‖W y + e − M x‖²``, ``y`` and ``x`` the inputs of the
        dense and the converted layer, ``e`` the difference of their residual streams.
        """
        dense, ref = seen.pop(stage), self.layout.layer_ref(position)
        modules = {module.path: module for module in self.plan.names.stored_modules(ref.index)}
        paths = [path for path in self.dense.stages[stage] if modules[path].rank]
        if not paths:
            return
        norm, difference = input_norm(inputs), dense.inputs - inputs
        # Maps that share inputs share the regression on them.
        regression = norm.fit(difference, inputs).to(inputs.dtype) if len(paths) > 1 else None
        for path in paths:
            weight, module = _weight(layers[0], path), modules[path]
            if regression is not None:
                correction = weight @ regression
            else:
                errors = difference @ weight.mT
                if dense.stream is not None and stream is not None:
                    errors += dense.stream - stream
                correction = norm.fit(errors, inputs).to(inputs.dtype)
            converted = _weight(layers[1], path)  # the shared weight until here
            b, a = norm.low_rank(weight + correction - converted, module.rank)
            factors = b.to(self.plan.config.dtype), a.to(self.plan.config.dtype)
            module.write_factors(output, ref.depth, factors)
            converted.copy_(merge_factors(converted, factors))

    def _load_converted(self, output: ShardedCheckpoint, position: int) -> nn.Module:
        """Load the converted layer at ``position`` as a dense one, without residuals."""
        ref = self.layout.layer_ref(position)
        parameters = {}
        for module in self.plan.names.stored_modules(ref.index):
            for parameter in module.parameters:
                is_shared = module.is_linear and parameter == "weight"
                parameters[f"{module.path}.{parameter}"] = (
                    output.read(module.shared_weight) if is_shared else module.read(output, parameter, ref.depth)
                )
        return self.dense.build(position, parameters)


def _weight(layer: nn.Module, path: str) -> Tensor:
    return layer.get_parameter(f"{path}.weight")
