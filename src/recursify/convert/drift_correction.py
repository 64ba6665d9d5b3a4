"""Residuals fitted to the inputs that the converted model produces: the second pass of the calibration.

The converted model's hidden states are computed next to the dense ones. Each residual is fitted, stage by stage
(q/k/v, o, gate/up, down), by reduced-rank regression of the dense layer's outputs on the converted layer's inputs.
Where a map writes to the residual stream, its target includes the stream's error so far (docs/calibration.md).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recursify.checkpoint.dense_names import merge_factors
from recursify.checkpoint.layerwise import Layerwise
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.progress import Progress

from .plan import ConversionPlan
from .unfinished import UnfinishedConversion
from .weighted_norm import input_norm

STAGE = "correct"
"""Name of the pass for progress."""


@dataclass(frozen=True)
class StageInputs:
    """Inputs ``[n, I]`` of a layer's stage, and the residual stream ``[n, D]`` that it writes to, if any."""

    inputs: Tensor
    stream: Tensor | None


class DriftCorrection:
    """Fit of all residuals of a conversion whose shared weights, norms and biases are written.

    Args:
        dense: Dense model.
        plan: Plan of the conversion.
        output: Checkpoint that is being written.
        progress: Callback for progress.
    """

    def __init__(self, dense: Layerwise, plan: ConversionPlan, output: ShardedCheckpoint, progress: Progress):
        self.dense = dense
        self.plan = plan
        self.layout = plan.layout
        self.output = output
        self.progress = progress

    def run(self, windows: Tensor, unfinished: UnfinishedConversion) -> None:
        """Fit and write the residuals on token ids ``[N, T]``, from the last finished layer on."""
        first = self.layout.num_prelude_layers
        # The coda is not refitted: refitted at full rank it learns the calibration text, and held-out perplexity rises.
        last = self.layout.num_layers - self.layout.num_coda_layers - 1
        done, states = unfinished.resume_at(STAGE) or (first, self._start(windows))
        dense_hidden, hidden = (state.to(self.dense.device) for state in states)
        for position in range(done, last + 1):
            dense, converted = self.dense.load(position), self._load_converted(position)
            seen: dict[int, list[StageInputs]] = defaultdict(list)

            def record(stage: int, inputs: Tensor, stream: Tensor | None, seen: Any = seen) -> None:
                seen[stage].append(StageInputs(inputs, stream))

            batches = self.dense.split(dense_hidden)
            dense_hidden = torch.cat([self.dense.run_in_stages(dense, position, batch, record) for batch in batches])
            # The whole text at once: a stage is refitted, and the layer goes on with what it was refitted to.
            refit = partial(self._refit_stage, (dense, converted), position, seen)
            hidden = self.dense.run_in_stages(converted, position, hidden, refit)
            unfinished.save(STAGE, position + 1, [dense_hidden, hidden], self.output)
            self.progress(STAGE, position - first + 1, last - first + 1)

    def _start(self, windows: Tensor) -> list[Tensor]:
        """Hidden states ``[N, T, D]`` of the dense and of the converted model before the block: the same."""
        hidden = self.dense.embed(windows)
        for position in range(self.layout.num_prelude_layers):
            hidden = self.dense.pass_layer(position, hidden)
        return [torch.cat(hidden)] * 2

    def _refit_stage(
        self,
        layers: tuple[nn.Module, nn.Module],
        position: int,
        seen: dict[int, list[StageInputs]],
        stage: int,
        inputs: Tensor,
        stream: Tensor | None,
    ) -> None:
        """Fit the residuals of a stage of the converted layer, given its inputs and the dense layer's in batches.

        The target is the map ``M`` nearest to ``W`` of ``min Σ ‖W y + e − M x‖²``, ``y`` and ``x`` the inputs of the
        dense and the converted layer, ``e`` the difference of their residual streams.
        """
        dense_batches, ref = seen.pop(stage), self.layout.layer_ref(position)
        modules = {module.path: module for module in self.plan.names.stored_modules(ref.index)}
        paths = [path for path in self.dense.stages[stage] if modules[path].rank]
        if not paths:
            return
        norm, difference = input_norm(inputs), torch.cat([batch.inputs for batch in dense_batches]).sub_(inputs)
        drift = [batch.stream for batch in dense_batches if batch.stream is not None]
        # Maps that share inputs share the regression on them.
        regression = norm.fit(difference, inputs).to(inputs.dtype) if len(paths) > 1 else None
        for path in paths:
            weight, converted = (layer.get_parameter(f"{path}.weight") for layer in layers)
            if regression is not None:
                correction = weight @ regression
            else:
                errors = difference @ weight.mT
                if drift and stream is not None:
                    errors += torch.cat(drift).sub_(stream)
                correction = norm.fit(errors, inputs).to(inputs.dtype)
            # ``converted`` is the shared weight until here.
            b, a = norm.low_rank(weight + correction - converted, modules[path].rank)
            factors = b.to(self.plan.config.dtype), a.to(self.plan.config.dtype)
            modules[path].write_factors(self.output, ref.depth, factors)
            converted.copy_(merge_factors(converted, factors))

    def _load_converted(self, position: int) -> nn.Module:
        """Load the converted layer at ``position`` as a dense one, without residuals."""
        ref = self.layout.layer_ref(position)
        parameters = {}
        for module in self.plan.names.stored_modules(ref.index):
            for parameter in module.parameters:
                is_shared = module.is_linear and parameter == "weight"
                parameters[f"{module.path}.{parameter}"] = (
                    self.output.read(module.shared_weight)
                    if is_shared
                    else module.read(self.output, parameter, ref.depth)
                )
        return self.dense.build(position, parameters)
