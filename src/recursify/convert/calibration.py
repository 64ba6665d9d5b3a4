"""Calibrated initialization: shared weights and residuals fitted to the model's activations on a text.

Two passes over the text, each with one tied group's dense layers and the hidden states in memory (docs/calibration.md):

1. **Share.** One cursor per recursion walks the dense model, so that the layers of a tied group are loaded together.
   The second moments of their inputs define the norm in which shared weight and residuals are solved jointly
   (:func:`~recursify.convert.sharing.share_for_residuals`). If drift correction follows, the first ``SHARE_TOKENS``
   tokens are enough, and the residuals are left to it.
2. **Correct drift.** The residuals are fitted to the inputs that the converted model produces
   (:mod:`~recursify.convert.drift_correction`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, load_tokenizer
from recursify.checkpoint.dense_names import Factors, StoredModule
from recursify.checkpoint.layerwise import Layerwise
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.evaluation.text import Text, num_context, text_start, token_windows
from recursify.progress import Progress

from .drift_correction import STAGE as CORRECTION_STAGE
from .drift_correction import DriftCorrection
from .fisher import fisher_information
from .initialization import average
from .plan import ConversionPlan, find_rank_allocation
from .relaxation import find_relaxation
from .sharing import share, share_for_residuals
from .unfinished import UnfinishedConversion
from .weighted_norm import TiedNorms, WeightedNorm, second_moment

STAGE = "share"
"""Name of the first pass for progress."""

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
    def run(self, output: ShardedCheckpoint, unfinished: UnfinishedConversion) -> dict[str, Any]:
        """Fit and write every shared weight and residual; returns the entry ``calibration`` of ``recursify.json``."""
        if unfinished.stage != CORRECTION_STAGE:
            self._share(output, unfinished)
        if self.plan.corrects_drift:
            DriftCorrection(self.dense, self.plan, output, self.progress).run(self.windows, unfinished)
        return {
            "text": self.text.name,
            "num_tokens": self.windows.numel(),
            "window": self.windows.shape[1],
            "window_start": self.tokenizer.convert_ids_to_tokens(text_start(self.tokenizer)),
            "drift_correction": self.plan.corrects_drift,
        }

    def facts(self) -> dict[str, Any]:
        """Facts that must not change when the conversion is resumed."""
        return {
            "source": self.plan.source,
            **self.plan.settings.to_dict(),
            "text": f"{self.text.name} ({zlib.crc32(self.windows.numpy().tobytes()):08x})",
            "torch": torch.__version__,
        }

    def tied_linears(self, stage_name: str) -> Iterator[TiedLinears]:
        """Tied linear maps of the shared block with their input norms; ``stage_name`` is for progress."""
        cursors = self._walk_to_starts(self.windows)
        for index in range(self.layout.block_size):
            yield from self._tied_linears_of(index, cursors)
            self.progress(stage_name, index + 1, self.layout.block_size)

    def curvatures(self, module: StoredModule) -> list[Tensor]:
        """Fisher information of a module's dense weights by depth, each ``[O, I]``."""
        positions = self.layout.positions(module.index)
        return [self._fisher[self.plan.names.dense(position, module.path, "weight")] for position in positions]

    @cached_property
    def _fisher(self) -> dict[str, Tensor]:
        return fisher_information(
            self.checkpoint, self.plan.names.stem, self.windows, num_context(self.tokenizer), self.progress
        )

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
                hidden = self.dense.pass_layer(position, hidden)
                self.progress("walk", position + 1, first_positions[-1])
        return starts

    def _share(self, output: ShardedCheckpoint, unfinished: UnfinishedConversion) -> None:
        """Fit the shared weights, from the last finished layer on, and the residuals, unless drift correction does."""
        windows = self.windows
        if self.plan.corrects_drift:
            windows = windows[: max(MIN_WINDOWS, SHARE_TOKENS // windows.shape[1])]
        done, states = unfinished.resume_at(STAGE) or (0, [])
        cursors = [self.dense.split(state) for state in states] or self._walk_to_starts(windows)
        for index in range(done, self.layout.block_size):
            for linears in self._tied_linears_of(index, cursors):
                self._write_linears(output, linears)
            unfinished.save(STAGE, index + 1, [torch.cat(cursor) for cursor in cursors], output)
            self.progress(STAGE, index + 1, self.layout.block_size)

    def _tied_linears_of(self, index: int, cursors: list[list[Tensor]]) -> Iterator[TiedLinears]:
        """Tied linear maps of one block layer; the cursors walk past its dense layers."""
        layers, moments = [], []
        num_tokens = sum(batch.shape[:2].numel() for batch in cursors[0])
        for depth, position in enumerate(self.layout.positions(index)):
            cursor = 0 if self.layout.order == "sequence" else depth
            layer = self.dense.load(position)
            cursors[cursor], input_moments = self._run_and_measure(layer, position, cursors[cursor])
            layers.append(layer)
            moments.append(input_moments)
        modules = {module.path: module for module in self.plan.names.stored_modules(index) if module.is_linear}
        for stage in self.dense.stages:
            norms = TiedNorms(WeightedNorm(moment.pop(stage[0]), num_tokens) for moment in moments)
            for path in stage:
                weights: list[Tensor] = [layer.get_parameter(f"{path}.weight") for layer in layers]
                yield TiedLinears(modules[path], weights, norms)

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
            shared = average([weight.cpu() for weight in weights], self.curvatures(module))
        else:
            shared = self.plan.initial_weight(self.checkpoint, module, self.generator)
        if self.plan.corrects_drift:
            output.write(module.shared_weight, shared)
        else:
            module.write_linear(output, shared, weights, fit)
