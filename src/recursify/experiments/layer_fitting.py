"""The algorithm of layer-wise healing.

A sweep runs the dense and the recursive model side by side over a part of the text, as drift correction does in
conversion (docs/calibration.md). Each shared layer is fitted at all depths at once: its inputs are the recursive
model's own hidden states, its targets the dense layers' outputs, and gradients flow through this layer only. The next
layer gets the outputs of the fitted one, so it learns to correct the remaining error.

Memory: one shared layer with its optimizer, the dense layers tied in it, and, for ``layer_tokens`` tokens, the hidden
states of both models per recursion.

Shape legend: b sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.dense_names import DenseNames
from recursify.checkpoint.layerwise import Layerwise
from recursify.checkpoint.writer import ShardedCheckpoint
from recursify.errors import TrainingError
from recursify.uptrain.arguments import training_arguments
from recursify.uptrain.data import IGNORED, Collator, Rows, TextData
from recursify.uptrain.losses import Sums, add_sums, cross_entropy, forward_kl, same_top1, softcapped
from recursify.uptrain.param_groups import balance_factors, find_optimizer, is_trained, parameter_groups
from recursify.uptrain.stage import TrainingRun
from recursify.uptrain.trainer import perplexity_of

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"

Layer = Callable[..., Tensor]
"""Layer of either model, with the call signature of the model family."""

States = list[list[Tensor]]
"""Hidden states ``[b, T, D]`` by batch and recursion (one entry if the block's layers run in sequence)."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences: tensors ``[b, T]``; ``is_real`` is False for padding."""

    ids: Tensor
    position_ids: Tensor
    labels: Tensor
    is_real: Tensor


class RecursiveParts:
    """Loader of the parts of one model, in float32 and eval mode.

    Args:
        names: Names of the model's parameters.
        read: Function from a parameter name of the recursive model to its tensor. Outside the shared block the tensors
            may be those of the dense model.
        device: Device of the parts.
    """

    def __init__(self, names: DenseNames, read: Callable[[str], Tensor], device: str = "cpu"):
        self.names = names
        self.read = read
        self.device = device

    def load(self, name: str) -> nn.Module:
        """Load the module ``name`` (``model.block.3`` for example), frozen."""
        skeleton = self.names.skeleton
        module = copy.deepcopy(skeleton.get_submodule(name)).to_empty(device=self.device)
        for inner in module.modules():  # buffers are not stored
            if any(True for _ in inner.buffers(recurse=False)):
                skeleton._init_weights(inner)
        state = {}
        for parameter, _ in module.named_parameters():
            full = f"{name}.{parameter}"
            if name == HEAD and full not in self.names.parameters:  # tied
                full = f"{EMBEDDING}.{parameter}"
            state[parameter] = self.read(full).to(self.device, torch.float32)
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()

    def layer(self, position: int) -> Callable[..., Tensor]:
        """Load the layer that runs at ``position``, bound to its depth, with the call signature of the model family."""
        ref = self.names.layout.layer_ref(position)
        layer = self.load(f"model.{ref.part}.{ref.index}")
        return partial(layer, depth=ref.depth) if ref.part == "block" else layer

    def logits_head(self) -> Callable[[Tensor], Tensor]:
        """Load final norm and head, as a function from hidden states ``[..., D]`` to logits ``[..., V]``."""
        norm, head = self.load(NORM), self.load(HEAD)
        return lambda hidden: softcapped(head(norm(hidden)), self.names.skeleton.config)


@dataclass(frozen=True)
class Model:
    """One of the two models, loaded in parts: those outside its layers, and the layer at a position."""

    parts: RecursiveParts
    layer: Callable[[int], Layer]


class LayerFitter:
    """Layer-wise healing of the shared block of one model.

    Each layer takes ``steps`` optimizer steps, on ``tokens`` tokens over all passes.

    Args:
        run: Run with the settings, the recursive model's config and the device.
        teacher: Checkpoint of the dense model.
        weights: Tensors of the recursive model, updated layer by layer.
        data: Packed sequences.
        pad: Token id of padding.
        log: Function that gets one line of figures per layer and sweep.
    """

    def __init__(
        self,
        run: TrainingRun,
        teacher: DenseCheckpoint,
        weights: ShardedCheckpoint,
        data: TextData,
        *,
        pad: int,
        log: Callable[[dict[str, Any]], None],
    ):
        self.settings, self.progress, self.log = run.settings, run.progress, log
        settings, device = run.settings, str(run.state.device)
        self.dense = Layerwise(teacher, run.config, device)
        # The layers of both models are made from one config, so that they take the same masks.
        names = DenseNames(self.dense.config)
        self.layout = names.layout
        dense_parts = RecursiveParts(names, lambda name: teacher.read(names.unshared[name]), device)
        self.teacher = Model(dense_parts, self.dense.load)
        recursive_parts = RecursiveParts(names, weights.read, device)
        self.student = Model(recursive_parts, recursive_parts.layer)
        self.weights = weights
        self.collator = Collator(settings.length, pad)
        self.device = device
        self.held_out = self._batches(list(data.evaluation))
        self._rows = _endless(data.train)
        per_batch = settings.batch_size * settings.length
        tokens_per_pass = math.ceil(settings.max_tokens / settings.layer_passes)
        self.batches_per_sweep = math.ceil(min(tokens_per_pass, settings.layer_tokens) / per_batch)
        self.num_sweeps = math.ceil(tokens_per_pass / (self.batches_per_sweep * per_batch))
        self.tokens = self.num_sweeps * self.batches_per_sweep * per_batch * settings.layer_passes
        self.steps = self.num_sweeps * self._steps_per_sweep(self.batches_per_sweep)
        self._arguments = training_arguments(settings, Path("."), world_size=1, resumes=False)
        self._held_out_teacher: list[Tensor] = []

    @torch.no_grad()
    def fit(self) -> None:
        """Run all sweeps; a TrainingError if the error of a layer is NaN or infinite."""
        self.progress("heal layers", 0, self.num_sweeps * self.layout.block_size)
        for sweep in range(self.num_sweeps):
            rows = islice(self._rows, self.batches_per_sweep * self.settings.batch_size)
            self._sweep(sweep, self._batches(list(rows)))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure held-out figures per predicted token, with the names of the other stages."""
        if not self._held_out_teacher:
            self._held_out_teacher = self._last_hidden_states(self.teacher, self.held_out)
        student_hidden = self._last_hidden_states(self.student, self.held_out)
        student_head, teacher_head = self.student.parts.logits_head(), self.teacher.parts.logits_head()
        sums: Sums = {}
        for batch, *hidden in zip(self.held_out, student_hidden, self._held_out_teacher, strict=True):
            keep = batch.labels[:, 1:] != IGNORED
            chunks = [states[:, :-1][keep].split(self.settings.loss_chunk) for states in hidden]
            targets = batch.labels[:, 1:][keep].split(self.settings.loss_chunk)
            for student_rows, teacher_rows, target in zip(*chunks, targets, strict=True):
                logits, teacher_logits = student_head(student_rows), teacher_head(teacher_rows)
                figures = {
                    "ce": cross_entropy(logits, target),
                    "dense_ce": cross_entropy(teacher_logits, target),
                    "kl": forward_kl(logits, teacher_logits, self.settings.temperature),
                    "agreement": same_top1(logits, teacher_logits).sum(),
                    "tokens": torch.tensor(len(target)),
                }
                add_sums(sums, {name: figure.double() for name, figure in figures.items()})
        tokens = sums.pop("tokens")
        means = {name: float(total / tokens) for name, total in sums.items()}
        return {**means, "loss": means["ce"], "perplexity": perplexity_of(means["ce"])}

    def _steps_per_sweep(self, num_batches: int) -> int:
        return self.settings.layer_passes * math.ceil(num_batches / self.settings.accumulate)

    # --- Text ----------------------------------------------------------------------------------------------------

    def _batches(self, rows: list[dict[str, Any]]) -> list[Batch]:
        batches = []
        for start in range(0, len(rows), self.settings.batch_size):
            batch = rows[start : start + self.settings.batch_size]
            tensors = {name: tensor.to(self.device) for name, tensor in self.collator(batch).items()}
            lengths = torch.tensor([len(row["input_ids"]) for row in batch], device=self.device)
            is_real = torch.arange(self.settings.length, device=self.device) < lengths[:, None]
            batches.append(Batch(tensors["input_ids"], tensors["position_ids"], tensors["labels"], is_real))
        return batches

    # --- Forward, layer by layer ---------------------------------------------------------------------------------

    def _layer_inputs(self, model: Model, batches: list[Batch], last: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Positions up to ``last`` with the hidden states before the layer at each."""
        embedding = model.parts.load(EMBEDDING)
        hidden = [embedding(batch.ids) for batch in batches]
        del embedding
        for position in range(last):
            yield position, hidden
            layer = model.layer(position)
            hidden = [
                self.dense.run(layer, position, states, batch.position_ids)
                for states, batch in zip(hidden, batches, strict=True)
            ]
        yield last, hidden

    def _last_hidden_states(self, model: Model, batches: list[Batch]) -> list[Tensor]:
        """Outputs of the last layer, before the final norm."""
        _, hidden = deque(self._layer_inputs(model, batches, self.layout.num_layers), maxlen=1).pop()
        return hidden

    def _block_inputs(self, model: Model, batches: list[Batch]) -> States:
        """Hidden states at the start of each recursion; in a sequence, at the start of the block."""
        layout = self.layout
        num_starts = 1 if layout.order == "sequence" else layout.num_recursions
        starts = [layout.position(0, depth) for depth in range(num_starts)]
        walk = self._layer_inputs(model, batches, starts[-1])
        by_recursion = [hidden for position, hidden in walk if position in starts]
        return [list(states) for states in zip(*by_recursion, strict=True)]

    def _outputs(self, layers: list[Layer], index: int, inputs: list[Tensor], batch: Batch) -> list[Tensor]:
        """Outputs of block layer ``index`` by depth; in a sequence, the input of a depth is the output before it."""
        outputs: list[Tensor] = []
        for depth, position in enumerate(self.layout.positions(index)):
            follows = self.layout.order == "sequence" and depth > 0
            hidden = outputs[-1].detach() if follows else inputs[depth]
            outputs.append(self.dense.run(layers[depth], position, hidden, batch.position_ids))
        return outputs

    # --- Fitting -------------------------------------------------------------------------------------------------

    def _sweep(self, sweep: int, batches: list[Batch]) -> None:
        """Fit all shared layers on ``batches``.

        The inputs of later recursions are those of the model before this sweep, since the layers before them are not
        healed yet; the next sweep updates them.
        """
        dense_inputs = self._block_inputs(self.teacher, batches)
        inputs = self._block_inputs(self.student, batches)
        kept = slice(-1, None) if self.layout.order == "sequence" else slice(None)
        size, totals = self.layout.block_size, {"step": self.steps, "tokens": self.tokens}
        for index in range(size):
            name = f"model.block.{index}"
            layers: list[Layer] = [self.dense.load(position) for position in self.layout.positions(index)]
            targets = [
                self._outputs(layers, index, states, batch) for states, batch in zip(dense_inputs, batches, strict=True)
            ]
            del layers
            dense_inputs = [outputs[kept] for outputs in targets]
            layer = self.student.parts.load(name)
            _, before = self._evaluate(layer, index, inputs, targets, batches)
            self._fit(layer, index, inputs, targets, batches)
            outputs, after = self._evaluate(layer, index, inputs, targets, batches)
            if after < before:
                for parameter, tensor in layer.named_parameters():
                    self.weights.write(f"{name}.{parameter}", tensor)
            else:
                outputs, after = self._evaluate(self.student.parts.load(name), index, inputs, targets, batches)
            inputs = [by_depth[kept] for by_depth in outputs]
            done = {name: total * (sweep + 1) // self.num_sweeps for name, total in totals.items()}
            self.log({**done, "layer": index, "error_before": before, "error_after": after})
            self.progress("heal layers", sweep * size + index + 1, self.num_sweeps * size)

    def _at_depths(self, layer: nn.Module) -> list[Layer]:
        return [partial(layer, depth=depth) for depth in range(self.layout.num_recursions)]

    def _evaluate(
        self, layer: nn.Module, index: int, inputs: States, targets: States, batches: list[Batch]
    ) -> tuple[States, float]:
        """Outputs of a shared layer by batch and depth, and its mean relative squared error."""
        depths = self._at_depths(layer)
        outputs = [self._outputs(depths, index, states, batch) for states, batch in zip(inputs, batches, strict=True)]
        errors = [relative_error(*arguments) for arguments in zip(outputs, targets, batches, strict=True)]
        return outputs, float(torch.stack(errors).mean())

    @torch.enable_grad()
    def _fit(self, layer: nn.Module, index: int, inputs: States, targets: States, batches: list[Batch]) -> None:
        settings = self.settings
        named = [(f"model.block.{index}.{name}", parameter) for name, parameter in layer.named_parameters()]
        for name, parameter in named:
            parameter.requires_grad_(is_trained(name, settings))
        balance_factors(layer)
        trained = [parameter for _, parameter in named if parameter.requires_grad]
        optimizer_class, options = find_optimizer(settings, self._arguments)
        optimizer = optimizer_class(parameter_groups(named, settings), **options)
        steps = self._steps_per_sweep(len(batches))
        schedule = get_scheduler(settings.schedule, optimizer, round(settings.warmup_fraction * steps), steps)
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(settings.layer_passes):
            for indices in torch.randperm(len(batches), generator=generator).split(settings.accumulate):
                for batch in indices.tolist():
                    outputs = self._outputs(self._at_depths(layer), index, inputs[batch], batches[batch])
                    loss = relative_error(outputs, targets[batch], batches[batch])
                    if not torch.isfinite(loss):
                        raise TrainingError(
                            f"The error of block layer {index} is {float(loss.detach())}. Use a lower learning rate, "
                            f"or check the data for broken rows."
                        )
                    (loss / len(indices)).backward()
                if settings.max_grad_norm:  # 0 turns clipping off, as in the Trainer
                    nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        layer.requires_grad_(False)
        for name, parameter in named:  # round to the stored dtype
            parameter.copy_(parameter.to(self.weights.tensors[name].dtype))


def relative_error(outputs: list[Tensor], targets: list[Tensor], batch: Batch) -> Tensor:
    """``mean |y − y*|² / |y*|²`` over real tokens and depths, for outputs ``y`` and targets ``y*`` ``[b, T, D]``.

    The error is relative per token because norms rescale every token to the same size. The hidden states of a few
    tokens (above all the first) are hundreds of times longer than the rest, and would dominate an absolute error.
    """
    errors = []
    for output, target in zip(outputs, targets, strict=True):
        y, expected = output[batch.is_real], target[batch.is_real]
        errors.append(((y - expected).square().sum(-1) / expected.square().sum(-1)).mean())
    return torch.stack(errors).mean()


def _endless(rows: Rows) -> Iterator[dict[str, Any]]:
    while True:
        yield from rows
