"""Layer-wise healing: every shared layer fitted to the dense layers that it stands for, one after the other.

A sweep walks dense and recursive model side by side over one part of the text, as drift correction does at conversion
(docs/calibration.md). At each shared layer, the recursive model's own hidden states go in, and the dense layers'
outputs are what should come out, at all depths at once; the gradient goes back through that one layer. The next layer
then sees what the fitted one puts out, and is asked to make up for what is still wrong.

In memory: one shared layer with its optimizer, the dense layers of its slot, and hidden states, dense and own, per
recursion, of ``layer_tokens`` tokens. Neither model is ever whole.

Shape legend: b sequences, T tokens, D hidden size.
"""

from __future__ import annotations

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
from recursify.errors import CheckpointError, TrainingError
from recursify.experiments.recursive_parts import EMBEDDING, RecursiveParts
from recursify.modeling import RecursiveConfig
from recursify.progress import Progress
from recursify.uptrain.data import IGNORED, Collator, Rows, TextData
from recursify.uptrain.lora_balance import balance_factors
from recursify.uptrain.losses import Sums, cross_entropy, forward_kl
from recursify.uptrain.objectives import same_choice
from recursify.uptrain.param_groups import find_optimizer, is_trained, parameter_groups
from recursify.uptrain.settings import UptrainSettings
from recursify.uptrain.trainer import perplexity_of, training_arguments

Layer = Callable[..., Tensor]
"""A layer of either model, called as the family's own."""

Cursors = list[list[Tensor]]
"""Hidden states ``[b, T, D]`` by batch and recursion; in a sequence, by batch and one."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences, ``[b, T]`` each; ``real`` is False in padding."""

    ids: Tensor
    position_ids: Tensor
    labels: Tensor
    real: Tensor


@dataclass(frozen=True)
class Side:
    """One of the two models: what lies outside its layers, and the layer at a position."""

    parts: RecursiveParts
    layer: Callable[[int], Layer]


class LayerHealing:
    """Heals the shared block of one model.

    Attributes:
        tokens: Tokens that each layer is shown in all, every pass counted.
        steps: Optimizer steps of each layer in all.

    Args:
        teacher: The dense model.
        config: The recursive model's.
        weights: The recursive model's tensors; read, and written as layers are done.
        data: Packed sequences.
        collator: Makes tensors of them.
        settings: Of the stage.
        log: Given one line of figures per layer and sweep.
        progress: Told of every layer done.
        device: Where layers and hidden states are.
    """

    def __init__(
        self,
        teacher: DenseCheckpoint,
        config: RecursiveConfig,
        weights: ShardedCheckpoint,
        data: TextData,
        collator: Collator,
        settings: UptrainSettings,
        *,
        log: Callable[[dict[str, Any]], None],
        progress: Progress,
        device: str = "cpu",
    ):
        self.dense = Layerwise(teacher, config, None, device)
        # Both models' layers from one config, so that they take the same masks.
        names = DenseNames(self.dense.config)
        self.layout = names.layout
        self.theirs = Side(
            RecursiveParts(names, lambda name: teacher.read(names.unshared[name]), device), self.dense.load
        )
        own = RecursiveParts(names, weights.read, device)
        self.own = Side(own, own.layer)
        self.weights = weights
        self.collator = collator
        self.settings = settings
        self.log = log
        self.progress = progress
        self.device = device
        self.held_out = self._batches(list(data.evaluation))
        self._rows = _endless(data.train)
        per_batch = settings.batch_size * settings.length
        wanted = math.ceil(settings.max_tokens / settings.layer_passes)
        self.batches_per_sweep = math.ceil(min(wanted, settings.layer_tokens) / per_batch)
        self.num_sweeps = math.ceil(wanted / (self.batches_per_sweep * per_batch))
        self.tokens = self.num_sweeps * self.batches_per_sweep * per_batch * settings.layer_passes
        self.steps = self.num_sweeps * self._steps_per_sweep(self.batches_per_sweep)
        self._arguments = training_arguments(settings, Path("."), world_size=1, resumes=False)
        self._held_out_dense: list[Tensor] = []

    @torch.no_grad()
    def run(self) -> None:
        """All sweeps.

        Raises:
            TrainingError: A layer's error is NaN or infinite.
        """
        self.progress("heal layers", 0, self.num_sweeps * self.layout.block_size)
        for sweep in range(self.num_sweeps):
            rows = islice(self._rows, self.batches_per_sweep * self.settings.batch_size)
            self._sweep(sweep, self._batches(list(rows)))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out figures per predicted token, under the names that the other stages have."""
        if not self._held_out_dense:
            self._held_out_dense = self._last_hidden_states(self.theirs, self.held_out)
        own_hidden = self._last_hidden_states(self.own, self.held_out)
        own_read_out, their_read_out = self.own.parts.compute_logits(), self.theirs.parts.compute_logits()
        sums: Sums = {}
        for batch, mine, theirs in zip(self.held_out, own_hidden, self._held_out_dense, strict=True):
            keep = batch.labels[:, 1:] != IGNORED
            kept = [tensor[keep].split(self.settings.loss_chunk) for tensor in (mine[:, :-1], theirs[:, :-1])]
            targets = batch.labels[:, 1:][keep].split(self.settings.loss_chunk)
            for own_rows, their_rows, target in zip(*kept, targets, strict=True):
                logits, taught = own_read_out(own_rows), their_read_out(their_rows)
                figures = {
                    "ce": cross_entropy(logits, target),
                    "dense_ce": cross_entropy(taught, target),
                    "kl": forward_kl(logits, taught, self.settings.temperature),
                    "agreement": same_choice(logits, taught).sum(),
                    "tokens": torch.tensor(len(target)),
                }
                sums = {name: sums.get(name, 0) + figure.double() for name, figure in figures.items()}
        tokens = sums.pop("tokens")
        means = {name: float(total / tokens) for name, total in sums.items()}
        return {**means, "loss": means["ce"], "perplexity": perplexity_of(means["ce"])}

    def _steps_per_sweep(self, num_batches: int) -> int:
        return self.settings.layer_passes * math.ceil(num_batches / self.settings.accumulate)

    # --- Text ----------------------------------------------------------------------------------------------------

    def _batches(self, rows: list[dict[str, Any]]) -> list[Batch]:
        made = []
        for start in range(0, len(rows), self.settings.batch_size):
            some = rows[start : start + self.settings.batch_size]
            tensors = {name: tensor.to(self.device) for name, tensor in self.collator(some).items()}
            used = torch.tensor([len(row["input_ids"]) for row in some], device=self.device)
            real = torch.arange(self.settings.length, device=self.device) < used[:, None]
            made.append(Batch(tensors["input_ids"], tensors["position_ids"], tensors["labels"], real))
        return made

    # --- Walking -------------------------------------------------------------------------------------------------

    def _walk(self, side: Side, batches: list[Batch], last: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Positions up to ``last``, each with the hidden states that the layer there is fed."""
        embedding = side.parts.load(EMBEDDING)
        hidden = [embedding(batch.ids) for batch in batches]
        del embedding
        for position in range(last):
            yield position, hidden
            layer = side.layer(position)
            hidden = [
                self.dense.run(layer, position, states, batch.position_ids)
                for states, batch in zip(hidden, batches, strict=True)
            ]
        yield last, hidden

    def _last_hidden_states(self, side: Side, batches: list[Batch]) -> list[Tensor]:
        """What the last layer puts out, before the final norm."""
        _, hidden = deque(self._walk(side, batches, self.layout.num_layers), maxlen=1).pop()
        return hidden

    def _starts(self, side: Side, batches: list[Batch]) -> Cursors:
        """Hidden states where each recursion begins; in a sequence, where the block does."""
        layout = self.layout
        num_cursors = 1 if layout.order == "sequence" else layout.num_recursions
        firsts = [layout.position(0, depth) for depth in range(num_cursors)]
        starts = [hidden for position, hidden in self._walk(side, batches, firsts[-1]) if position in firsts]
        return [list(by_recursion) for by_recursion in zip(*starts, strict=True)]

    def _outputs(self, layers: list[Layer], index: int, fed: list[Tensor], batch: Batch) -> list[Tensor]:
        """Outputs by depth of block layer ``index``; in a sequence, each depth is fed what the one before put out."""
        outputs: list[Tensor] = []
        for depth, position in enumerate(self.layout.positions(index)):
            follows = self.layout.order == "sequence" and depth > 0
            hidden = outputs[-1].detach() if follows else fed[depth]
            outputs.append(self.dense.run(layers[depth], position, hidden, batch.position_ids))
        return outputs

    # --- Fitting -------------------------------------------------------------------------------------------------

    def _sweep(self, sweep: int, batches: list[Batch]) -> None:
        """Fit all shared layers on ``batches``.

        Later recursions begin with what the model put out before this sweep: the layers ahead of them are yet to be
        healed. The next sweep begins with what they are then.
        """
        theirs, mine = self._starts(self.theirs, batches), self._starts(self.own, batches)
        keeps = slice(-1, None) if self.layout.order == "sequence" else slice(None)
        size = self.layout.block_size
        for index in range(size):
            name = f"model.block.{index}"
            layers: list[Layer] = [self.dense.load(position) for position in self.layout.positions(index)]
            targets = [self._outputs(layers, index, fed, batch) for fed, batch in zip(theirs, batches, strict=True)]
            del layers
            theirs = [outputs[keeps] for outputs in targets]
            layer = self.own.parts.load(name)
            _, before = self._run_over(layer, index, mine, targets, batches)
            self._fit(layer, index, mine, targets, batches)
            outputs, after = self._run_over(layer, index, mine, targets, batches)
            if after < before:
                for parameter, tensor in layer.named_parameters():
                    self.weights.write(f"{name}.{parameter}", tensor)
            else:
                outputs, after = self._run_over(self.own.parts.load(name), index, mine, targets, batches)
            mine = [by_depth[keeps] for by_depth in outputs]
            done = sweep * size + index + 1
            self.log(
                {
                    "step": self.steps * (sweep + 1) // self.num_sweeps,
                    "tokens": self.tokens * (sweep + 1) // self.num_sweeps,
                    "layer": index,
                    "error_before": before,
                    "error_after": after,
                }
            )
            self.progress("heal layers", done, self.num_sweeps * size)

    def _at_depths(self, layer: nn.Module) -> list[Layer]:
        return [partial(layer, depth=depth) for depth in range(self.layout.num_recursions)]

    def _run_over(
        self, layer: nn.Module, index: int, mine: Cursors, targets: Cursors, batches: list[Batch]
    ) -> tuple[Cursors, float]:
        """A shared layer's outputs by batch and depth, and its mean relative squared error."""
        depths = self._at_depths(layer)
        outputs = [self._outputs(depths, index, fed, batch) for fed, batch in zip(mine, batches, strict=True)]
        errors = [relative_error(*three) for three in zip(outputs, targets, batches, strict=True)]
        return outputs, float(torch.stack(errors).mean())

    @torch.enable_grad()
    def _fit(self, layer: nn.Module, index: int, mine: Cursors, targets: Cursors, batches: list[Batch]) -> None:
        settings = self.settings
        named = [(f"model.block.{index}.{name}", parameter) for name, parameter in layer.named_parameters()]
        for name, parameter in named:
            parameter.requires_grad_(is_trained(name, settings))
        balance_factors(layer)
        trained = [parameter for _, parameter in named if parameter.requires_grad]
        kind, options = find_optimizer(settings, self._arguments)
        optimizer = kind(parameter_groups(named, settings), **options)
        steps = self._steps_per_sweep(len(batches))
        schedule = get_scheduler(
            settings.schedule, optimizer, round(settings.warmup_fraction * steps), num_training_steps=steps
        )
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(settings.layer_passes):
            for chosen in torch.randperm(len(batches), generator=generator).split(settings.accumulate):
                for batch in chosen.tolist():
                    outputs = self._outputs(self._at_depths(layer), index, mine[batch], batches[batch])
                    loss = relative_error(outputs, targets[batch], batches[batch])
                    if not torch.isfinite(loss):
                        raise TrainingError(
                            f"The error of block layer {index} is {float(loss.detach())}. Try a lower learning rate, "
                            f"or look for broken rows in the data."
                        )
                    (loss / len(chosen)).backward()
                if settings.max_grad_norm:  # 0 is the Trainer's way to say no clipping
                    nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        layer.requires_grad_(False)
        for name, parameter in named:  # what will be read back
            parameter.copy_(parameter.to(self.weights.tensors[name].dtype))


def relative_error(outputs: list[Tensor], wanted: list[Tensor], batch: Batch) -> Tensor:
    """``mean |y − y*|² / |y*|²`` over real tokens and depths, of outputs ``y`` and dense ones ``y*`` ``[b, T, D]``.

    Relative per token, since the norms that read the residual stream make tokens equal: a few (the first above all) are
    hundreds of times longer than the rest, and would be all that is fitted.
    """
    errors = []
    for mine, theirs in zip(outputs, wanted, strict=True):
        own, target = mine[batch.real], theirs[batch.real]
        errors.append(((own - target).square().sum(-1) / target.square().sum(-1)).mean())
    return torch.stack(errors).mean()


def _endless(rows: Rows) -> Iterator[dict[str, Any]]:
    while True:
        yield from rows


def require_same_layers(teacher: DenseCheckpoint, names: DenseNames) -> None:
    """A dense model of other shapes has no layers to fit these to.

    Raises:
        CheckpointError: A parameter is missing or has another shape; the message names it.
    """
    for name, shape in names.dense_parameters.items():
        found = teacher.parameters.get(name)
        if found is None or found.shape != shape:
            what = "has none" if found is None else f"has {list(found.shape)}"
            raise CheckpointError(
                f"The layers of the teacher '{teacher.source}' are not those of this model: of '{name}' it wants "
                f"{list(shape)}, and the teacher {what}. Give the dense model that the recursive one was made from."
            )
