"""Decoding in which every row of a batch exits on its own, with exact keys and values for what it skipped.

The layers are cut into segments at the exits. A row's *column* is the place of a token in the padded batch. For every
row and segment the decoder knows how many columns have been through it (``done``): a prefix, since a token can run a
segment only when all before it have. A token that exits leaves later segments behind; the next token of its row that
needs them takes all of those along in one call (FREE's synchronized parallel decoding, arXiv 2310.05424), so that their
keys and values are those of a full forward. Rows need different numbers of tokens in such a call: the shorter ones are
padded on the left and write nothing there.

Shape legend: B rows of the batch, s rows in a call, n columns in a call, D hidden size, V vocabulary, T columns in all.

This file travels inside every checkpoint: it imports torch and transformers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .recursive_policies import ExitContext, ExitLimits, ExitSettings, exits

ATTENTION = ("eager", "sdpa")
"""Attention implementations that take a mask of any shape."""

GROWTH = 256
"""Columns by which caches grow."""


@dataclass
class ExitGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``generate(exit_policy=…, return_dict_in_generate=True)`` returns.

    Attributes:
        exit_depths: ``[B, new]``: the exit that each new token left by; the number of exits where all layers ran, as
            for the first one always; -1 in padding.
        layers_run: ``[B]``: layers that ran for the new tokens of each row, readouts through the coda included. A call
            for several of its tokens counts once, and what only makes keys and values (``copied``) does not count.
        block_calls: How often a segment was run, for all rows together.
    """

    exit_depths: Tensor | None = None
    layers_run: Tensor | None = None
    block_calls: int | None = None


class KeysAndValuesWritten(Exception):
    """Ends a layer's forward once its keys and values are in the cache, when nothing else of it is wanted."""


class ColumnCache(Cache):
    """Keys and values ``[B, heads, T, head size]`` per layer, written by row and column.

    Where the next call writes is set by :meth:`aim`; transformers' layers then call :meth:`update` as of any cache.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._rows = self._columns = self._valid = torch.empty(0)
        self._span = 0
        self._stop = False

    def aim(self, rows: Tensor, columns: Tensor, valid: Tensor, span: int, *, stop: bool = False) -> None:
        """Have layers write ``columns [s, n]`` of ``rows [s]`` where ``valid``, and read the first ``span`` columns.

        Args:
            rows: Rows of the batch.
            columns: The column of each token.
            valid: Which of them to write.
            span: How many columns to attend to; the mask says which.
            stop: End each layer's forward when its keys and values are written.
        """
        self._rows, self._columns, self._valid, self._span, self._stop = rows, columns, valid, span, stop

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):
        """Write ``[s, heads, n, head size]``; returns what is to be attended to."""
        read = tuple(
            self._write(store, layer_idx, new) for store, new in ((self.keys, key_states), (self.values, value_states))
        )
        if self._stop:
            raise KeysAndValuesWritten
        return read

    def _write(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        held = store.get(layer)
        if held is None:
            held = new.new_zeros(self.num_rows, new.shape[1], 0, new.shape[3])
        held = store[layer] = with_room(held, 2, self._span)
        by_column = held.transpose(1, 2)
        rows, columns, valid = (index.to(new.device) for index in (self._rows, self._columns, self._valid))
        where = (rows[:, None], columns)
        by_column[where] = torch.where(valid[..., None, None], new.transpose(1, 2), by_column[where])
        read = held if len(rows) == self.num_rows else held[rows]
        return read[:, :, : self._span]

    def copy_column(self, source: int, target: int, rows: Tensor, columns: Tensor) -> None:
        """Give layer ``target`` what ``source`` has at one column of each row."""
        for store in (self.keys, self.values):
            copied = store[source].transpose(1, 2)[rows.to(store[source].device), columns.to(store[source].device)]
            held = store[target]
            held.transpose(1, 2)[rows.to(held.device), columns.to(held.device)] = copied.to(held.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are attended to."""
        return self._span


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on ``device``, without waiting for what the device is doing.

    A plain copy to a GPU waits, from lists that index a tensor, too: several times per step and segment.
    """
    held = torch.tensor(values, dtype=dtype)
    return (held.pin_memory() if device.type == "cuda" else held).to(device, non_blocking=True)


def with_room(held: Tensor, axis: int, columns: int) -> Tensor:
    """``held`` with so many columns along ``axis`` at least; new ones are 0, and come :data:`GROWTH` at a time."""
    missing = columns - held.shape[axis]
    if missing <= 0:
        return held
    shape = list(held.shape)
    shape[axis] = -(-missing // GROWTH) * GROWTH
    return torch.cat([held, held.new_zeros(shape)], dim=axis)


class DepthDecoder:
    """Runs the tokens of a batch as far as they need, for one call of ``generate``.

    Args:
        model: A ``RecursiveForCausalLM``, which runs all recursions by its config.
        settings: One for all rows, or one per row, alike but for thresholds, minimum depth and decay.
        attention_mask: ``[B, T]`` of the prompt, 0 in the padding on its left.
        max_length: Columns at most.

    Raises:
        ValueError: The model cannot exit as asked.
    """

    def __init__(self, model: Any, settings: Sequence[ExitSettings], attention_mask: Tensor, max_length: int) -> None:
        self.model = model
        self.settings = list(settings)
        self.layout = model.config.layout
        cuts = _cuts(model, self.settings[0])
        self.num_exits = len(cuts)
        for each in self.settings:
            check_depths(each, self.num_exits)
        bounds = [0, *cuts, self.layout.num_layers]
        self.segments = [range(start, end) for start, end in pairwise(bounds)]
        self.prompt_length = attention_mask.shape[1]
        self.max_length = max_length
        num_rows = len(attention_mask)
        self.cache = ColumnCache(num_rows)
        self.first = first_columns(attention_mask)
        self.columns = [self.prompt_length - 1] * num_rows
        self.done = [self.first.tolist() for _ in self.segments]
        self.layers_run = [0] * num_rows
        self.block_calls = 0
        # What enters each segment, by column: embeddings, then states at the exits.
        shape, dtype = (num_rows, 0, model.config.hidden_size), model.get_input_embeddings().weight.dtype
        self.entering = [torch.zeros(shape, dtype=dtype, device=self.first.device) for _ in self.segments]
        adapt = self.settings[0].adapt
        if adapt is not None:
            adapt.begin(num_rows)
        self.learning = adapt if adapt is not None and adapt.learning else None
        self.readings = ExitReadings(num_rows, self.num_exits, self.first.device)

    # --- Running layers ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Logits ``[B, V]`` after the prompt ``[B, T]``, which runs all layers."""
        rows, device = list(range(len(input_ids))), input_ids.device
        columns = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
        self._put(torch.arange(len(rows), device=device), columns, input_ids)
        for segment in range(len(self.segments)):
            states = self.advance(segment, rows)[:, -1]
        self.layers_run = [0] * len(rows)
        self.block_calls = 0
        return self.compute_logits(states)

    def append(self, tokens: Tensor, rows: list[int]) -> None:
        """Put the next token of each of ``rows`` after its last column; ``tokens [B]``."""
        for row in rows:
            self.columns[row] += 1
        index, columns = self._places(rows)
        self._put(index, columns[:, None], tokens[index][:, None])

    def advance(self, segment: int, rows: list[int]) -> Tensor:
        """Run ``segment`` for the last tokens of ``rows`` and for those before them that wait; states ``[s, n, D]``.

        They end with the last column of each row; a row of which fewer wait has others before, of no meaning.
        """
        width = max(self.columns[row] + 1 - self.done[segment][row] for row in rows)
        device = self.first.device
        last, done = [self.columns[row] for row in rows], [self.done[segment][row] for row in rows]
        index, columns, done = on_device([rows, last, done], device)
        columns = columns[:, None] + torch.arange(1 - width, 1, device=device)
        valid = columns >= done[:, None]
        columns = columns.clamp(min=0)
        states = self.entering[segment][index[:, None], columns]
        states = self._run(self.segments[segment], states, index, columns, valid)
        if segment + 1 < len(self.segments):
            held = self._reserve(segment + 1)
            where = (index[:, None], columns)
            held[where] = torch.where(valid[..., None], states.to(held.device), held[where])
        for row in rows:
            self.done[segment][row] = self.columns[row] + 1
            self.layers_run[row] += len(self.segments[segment])
        self.block_calls += 1
        return states

    def _run(
        self,
        positions: Sequence[int],
        states: Tensor,
        rows: Tensor,
        columns: Tensor,
        valid: Tensor,
        *,
        only_keys_and_values: bool = False,
    ) -> Tensor:
        """The layers at ``positions``, on ``states [s, n, D]``.

        With ``only_keys_and_values`` each of them has the same states, and is done when it has written those.
        """
        base = self.model.model
        span = max(self.columns) + 1
        position_ids = (columns - self.first[rows][:, None]).clamp(min=0)
        rotations = base.rotations(states, position_ids)
        masks: dict[int | None, Tensor] = {}
        self.cache.aim(rows, columns, valid, span, stop=only_keys_and_values)
        for position in positions:
            window = window_of(self.model.config, position)
            if window not in masks:
                masks[window] = self._mask(states, rows, columns, span, window)
            kind = base.layer_type(position)
            try:
                states = base.run_slot(
                    self.layout.layer_ref(position),
                    states,
                    attention_mask=masks[window],
                    position_embeddings=rotations[kind] if isinstance(rotations, dict) else rotations,
                    position_ids=position_ids,
                    use_cache=True,
                    **{base.cache_argument: self.cache},
                )
            except KeysAndValuesWritten:
                continue
        return states

    def _mask(self, states: Tensor, rows: Tensor, columns: Tensor, span: int, window: int | None) -> Tensor:
        """What to add to scores ``[s, 1, n, span]``: 0 where a token may look, the lowest number elsewhere."""
        keys = torch.arange(span, device=columns.device)
        visible = (keys <= columns[..., None]) & (keys >= self.first[rows][:, None, None])
        if window is not None:
            visible &= columns[..., None] - keys < window
        mask = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
        return mask.masked_fill(~visible, torch.finfo(states.dtype).min)[:, None]

    # --- Exiting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: Tensor, rows: list[int], unfinished: Tensor) -> Step:
        """Run the next token of every row as far as it needs.

        Args:
            tokens: ``[B]``.
            rows: Rows that went on in the step before.
            unfinished: ``[B]``, on the device: rows that go on in this one. It is fetched together with the first
                exit's decisions, since every fetch waits for the device.
        """
        policy, cost = self.settings[0].policy, list(self.layers_run)
        self.append(tokens, rows)
        outcome = Step(tokens.new_full(tokens.shape, self.num_exits))
        said: list[Tensor] = []
        before: Tensor | None = None
        for depth in range(self.num_exits):
            states = self.advance(depth, rows)[:, -1]
            boundary = self._boundary(depth, states, rows, before)
            here = unfinished if len(rows) == len(unfinished) else unfinished[self._places(rows)[0]]
            goes_on, is_exiting = torch.stack([here, self._decide(boundary, rows)]).tolist()
            for row in [row for row, on in zip(rows, goes_on, strict=True) if not on]:
                self.rewind(row, 1)
                self.layers_run[row] = cost[row]
            leaving = [place for place in range(len(rows)) if goes_on[place] and is_exiting[place]]
            staying = [place for place in range(len(rows)) if goes_on[place] and not is_exiting[place]]
            if leaving:
                left = [rows[place] for place in leaving]
                outcome.add(left, self._exit_logits(boundary, leaving, left), depth)
                self._fill_skipped(depth, pick(states, leaving), left)
            rows = [rows[place] for place in staying]
            if policy.simulated:
                said.append(pick(boundary.logits.argmax(-1), staying))
            if policy.needs_previous_logits:
                before = pick(boundary.logits, staying)
            if not rows:
                return outcome
        outcome.add(rows, self._read_last(self.advance(self.num_exits, rows), rows), self.num_exits)
        if said:
            assert outcome.logits is not None
            index = self._places(rows)[0]
            last = outcome.logits[index].argmax(-1)
            for depth in reversed(range(self.num_exits)):
                outcome.exits[index] = torch.where(said[depth] == last, depth, outcome.exits[index])
        return outcome

    def _read_last(self, states: Tensor, rows: list[int]) -> Tensor:
        """Logits ``[s, V]`` of the last tokens, given what the last segment makes of them and of those before them.

        Thresholds that are learned in use learn from all of these ``[s, n, D]``.
        """
        if self.learning is None:
            return self.compute_logits(states[:, -1])
        logits = self.compute_logits(states)
        index, last = self._places(rows)
        columns = last[:, None] + torch.arange(1 - states.shape[1], 1, device=last.device)
        for depth, (confidence, choice) in enumerate(self.readings.take(index, columns.clamp(min=0))):
            self.learning.learn(depth, confidence, choice == logits.argmax(-1), choice >= 0)
        return logits[:, -1]

    def _decide(self, boundary: ExitContext, rows: list[int]) -> Tensor:
        """Decide which of ``rows`` exit, bool ``[s]``."""
        depth = boundary.depth
        limits = [self._limits(row, depth) for row in rows]
        if self.learning is None and not any(exits(math.inf, row) for row in limits):
            return torch.zeros(len(rows), dtype=torch.bool, device=boundary.states.device)
        confidence = self.settings[0].policy.confidence(boundary)
        if self.learning is not None:
            columns = max(self.columns) + 1
            self.readings.note(depth, self._places(rows), columns, confidence, boundary.all_logits.argmax(-1))
        by_name = on_device(list(zip(*limits, strict=True)), confidence.device, torch.float32)
        return exits(confidence, ExitLimits(*by_name))

    def _limits(self, row: int, depth: int) -> ExitLimits:
        """The limits of the last token of ``row`` after ``depth``."""
        settings, steps = self.settings[row], max(self.max_length - self.prompt_length, 1)
        threshold = math.inf  # a simulated policy decides when all depths have run
        if not settings.policy.simulated:
            threshold = settings.threshold_at(depth, self.num_exits, self.columns[row] - self.prompt_length, steps)
        return ExitLimits(
            depth,
            self.num_exits,
            threshold,
            settings.min_depth,
            self._pending(row) if settings.kv == "deferred" else 0,
            settings.max_pending,
        )

    def _pending(self, row: int) -> int:
        """Tokens of ``row``, its last included, that have not run the last segment."""
        return self.columns[row] + 1 - self.done[-1][row]

    def _boundary(self, depth: int, states: Tensor, rows: list[int], before: Tensor | None) -> ExitContext:
        index, columns = self._places(rows)
        previous = self.entering[depth][index, columns]
        heads = self.model.exit_heads if self.settings[0].layers is None else None
        return ExitContext(
            depth,
            states,
            previous,
            arrive=lambda: self._to_exit(states, rows),
            read=lambda exit_states, vocabulary: self._read_arrived(depth, exit_states, vocabulary),
            previous_logits=before,
            test=None if heads is None else lambda: heads[depth].agreement(states),
            vocabulary=self.settings[0].policy.vocabulary,
        )

    def _exit_logits(self, boundary: ExitContext, places: list[int], rows: list[int]) -> Tensor:
        """The exit's logits for ``rows``, at ``places`` in the boundary; what is not known is made for them alone."""
        logits, arrived = boundary.known("all_logits"), boundary.known("exit_states")
        if logits is not None:
            return pick(logits, places)
        if arrived is None:
            return self.compute_exit_logits(boundary.depth, pick(boundary.states, places), rows)
        return self._read_arrived(boundary.depth, pick(arrived, places))

    def compute_exit_logits(self, depth: int, states: Tensor, rows: list[int]) -> Tensor:
        """Logits ``[s, V]`` of an exit, of the states ``[s, D]`` there."""
        return self._read_arrived(depth, self._to_exit(states, rows))

    def _to_exit(self, states: Tensor, rows: list[int]) -> Tensor:
        """What an exit reads out, ``[s, D]``, of the states there."""
        if self.settings[0].layers is None and self.model.config.exit_through_coda:
            return self._run_last(self.layout.coda_positions, states, rows)
        return states

    def _read_arrived(self, depth: int, exit_states: Tensor, vocabulary: int | None = None) -> Tensor:
        if self.settings[0].layers is not None:
            return self.compute_logits(exit_states, vocabulary)
        return self.model.compute_exit_logits(depth, exit_states, vocabulary)

    def compute_logits(self, states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[..., V]`` of the whole model, of what the last segment puts out, ``[..., D]``."""
        return self.model.compute_logits(self.model.model.norm(states), vocabulary)

    def _run_last(self, positions: Sequence[int], states: Tensor, rows: list[int], **arguments: Any) -> Tensor:
        """Layers for the last token of each of ``rows``: ``[s, D] -> [s, D]``."""
        index, columns = self._places(rows)
        columns = columns[:, None]
        for row in rows if not arguments else ():
            self.layers_run[row] += len(positions)
        written = torch.ones_like(columns, dtype=torch.bool)
        return self._run(positions, states[:, None], index, columns, written, **arguments)[:, -1]

    def _fill_skipped(self, depth: int, states: Tensor, rows: list[int]) -> None:
        """Give the layers that ``rows`` skip the keys and values that the mode of the settings has for them."""
        kv = self.settings[0].kv
        if kv == "deferred":
            return
        skipped = [position for segment in self.segments[depth + 1 :] for position in segment]
        if self.settings[0].layers is None and self.model.config.exit_through_coda:
            skipped = [position for position in skipped if position not in self.layout.coda_positions]  # it has run
        if kv == "latest":
            index, columns = self._places(rows)
            for position in skipped:
                slot = self.layout.layer_ref(position)
                if slot.part == "block":
                    self.cache.copy_column(self.layout.position(slot.index, depth), position, index, columns)
            skipped = [position for position in skipped if self.layout.layer_ref(position).part == "coda"]
        self._run_last(skipped, states, rows, only_keys_and_values=True)
        for done in self.done[depth + 1 :]:
            for row in rows:
                done[row] = self.columns[row] + 1

    # --- Columns -------------------------------------------------------------------------------------------------

    def _places(self, rows: list[int]) -> Tensor:
        """``rows`` and the last column of each, ``[2, s]``."""
        return on_device([rows, [self.columns[row] for row in rows]], self.first.device)

    def _put(self, rows: Tensor, columns: Tensor, tokens: Tensor) -> None:
        """Embed ``tokens [s, n]`` into ``columns [s, n]`` of ``rows [s]``."""
        held = self._reserve(0)
        embedded = self.model.get_input_embeddings()(tokens).to(held.device)
        held[rows[:, None], columns] = embedded

    def _reserve(self, segment: int) -> Tensor:
        """What enters ``segment``, with room for all columns there are."""
        self.entering[segment] = with_room(self.entering[segment], 1, max(self.columns) + 1)
        return self.entering[segment]

    def rewind(self, row: int, count: int) -> None:
        """Forget the last ``count`` tokens of ``row``: what they wrote is written over."""
        self.columns[row] -= count
        for done in self.done:
            done[row] = min(done[row], self.columns[row] + 1)


def pick(tensor: Tensor, places: list[int]) -> Tensor:
    """The entries at rising ``places`` of the first axis; all of them as they are."""
    return tensor if len(places) == len(tensor) else tensor[on_device(places, tensor.device, torch.long)]


class ExitReadings:
    """What exits said of tokens that have not run all layers yet, by exit, row and column.

    Args:
        num_rows: Rows of the batch.
        num_exits: Exits.
        device: Of the tensors.
    """

    def __init__(self, num_rows: int, num_exits: int, device: torch.device) -> None:
        self._confidence = torch.zeros(num_exits, num_rows, 0, device=device)
        self._choice = torch.zeros(num_exits, num_rows, 0, dtype=torch.long, device=device)  # the token + 1; 0 for none

    def note(self, depth: int, places: Tensor, num_columns: int, confidence: Tensor, choice: Tensor) -> None:
        """Keep ``confidence [s]`` and first ``choice [s]`` of an exit at ``places [2, s]``, rows and columns."""
        self._confidence = with_room(self._confidence, 2, num_columns)
        self._choice = with_room(self._choice, 2, num_columns)
        self._confidence[depth, places[0], places[1]] = confidence.float()
        self._choice[depth, places[0], places[1]] = choice + 1

    def take(self, rows: Tensor, columns: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per exit, confidences and choices ``[s, n]`` at ``columns [s, n]``, -1 where none was; forgets them."""
        index = rows[:, None]
        taken = []
        for confidence, choice in zip(self._confidence, self._choice, strict=True):
            taken.append((confidence[index, columns], choice[index, columns] - 1))
            choice[index, columns] = 0
        return taken


@dataclass
class Step:
    """What came of one step.

    Attributes:
        exits: ``[B]``, see :class:`ExitGenerateOutput`.
        logits: ``[B, V]``, of the rows that go on; None when there are none.
        rows: Those rows.
    """

    exits: Tensor
    logits: Tensor | None = None
    rows: list[int] = field(default_factory=list)

    def add(self, rows: list[int], logits: Tensor, exit: int) -> None:
        """``rows`` left by ``exit``, saying ``logits [s, V]``."""
        if self.logits is None:
            self.logits = logits.new_zeros(len(self.exits), logits.shape[-1])
        if len(rows) == len(self.exits):
            self.logits, self.exits = logits, torch.full_like(self.exits, exit)
        else:
            index = on_device(rows, logits.device)
            self.logits[index] = logits
            self.exits[index] = exit
        self.rows = sorted([*self.rows, *rows])


def check_depths(settings: ExitSettings, num_exits: int) -> None:
    """Raises:
    ValueError: Settings for exits that are not there.
    """
    thresholds, policy = settings.policy.threshold, settings.policy
    if isinstance(thresholds, tuple) and len(thresholds) != num_exits:
        raise ValueError(f"Policy '{policy.name}' has {len(thresholds)} thresholds, and the model {num_exits} exits.")
    depth = max(settings.min_depth, *(policy.thresholds(1) if policy.name == "fixed" else (0,)))
    if depth >= num_exits:
        raise ValueError(
            f"There is no exit after depth {depth:g}: the model has {num_exits}, after depths 0 to {num_exits - 1}."
        )


def window_of(config: Any, position: int) -> int | None:
    """How far back the layer at ``position`` looks; None for all the way."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds and kinds[position] != "sliding_attention"):
        return None
    return int(window)


def _cuts(model: Any, settings: ExitSettings) -> list[int]:
    """After how many layers the exits are.

    Raises:
        ValueError: The model has none, or none there.
    """
    config, layout = model.config, model.config.layout
    if config.anderson:
        raise ValueError(
            f"The model mixes loops (anderson={config.anderson}), which tokens that stop between them would not take "
            f"part in. Make it with_recursions(..., anderson=0) for an exit policy or speculation."
        )
    if config.exit_depth is not None:
        raise ValueError(
            f"The model is set to exit after depth {config.exit_depth} always (config.exit_depth). Set it to None for "
            f"an exit policy."
        )
    if config._attn_implementation not in ATTENTION:
        raise ValueError(
            f"Exit policies need attention that takes any mask ({' or '.join(ATTENTION)}), and the model's is "
            f"'{config._attn_implementation}'. Load it with attn_implementation='sdpa'."
        )
    settings.policy.check_vocabulary(config.vocab_size)
    if settings.layers is not None:
        bad = [layer for layer in settings.layers if not 0 < layer < layout.num_layers]
        if bad or list(settings.layers) != sorted(set(settings.layers)) or not settings.layers:
            raise ValueError(
                f"layers={settings.layers} must be rising numbers of layers from 1 to {layout.num_layers - 1}, after "
                f"which a token may exit."
            )
        if settings.policy.needs_head or settings.kv == "latest":
            what = f"policy '{settings.policy.name}'" if settings.policy.needs_head else "kv 'latest'"
            raise ValueError(f"{what} works at recursion boundaries only. Leave layers out, or choose another.")
        return list(settings.layers)
    if not config.exit_depths:
        raise ValueError(
            f"A model with {layout.num_recursions} recursions in {layout.order} sharing has no boundary to exit at. "
            f"Give layers=(…,) to exit after so many layers."
        )
    if settings.policy.needs_head and model.exit_heads is None:
        raise ValueError(
            f"Policy '{settings.policy.name}' needs exit heads, and the model has none. Train them (recursify uptrain "
            f"--stage exits), or use policy 'confidence'."
        )
    return [layout.layers_before(depth) for depth in config.exit_depths]


REFUSED = ("inputs_embeds", "exit_depth", "num_recursions", "assistant_model", "prompt_lookup_num_tokens")
"""Arguments of ``generate`` that neither early exits nor speculation can heed."""


def refuse_arguments(given: dict[str, Any]) -> None:
    """Raises:
    ValueError: One of :data:`REFUSED` is given.
    """
    for name in REFUSED:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} works neither with an exit policy nor with speculation, which decide themselves how far a "
                f"token runs, from ids. Leave it out."
            )


def first_columns(attention_mask: Tensor) -> Tensor:
    """The column ``[B]`` at which each prompt begins.

    Raises:
        ValueError: One has no token, padding at its end, or a hole.
    """
    first = attention_mask.long().argmax(-1)
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if not torch.equal(attention_mask.bool(), columns >= first[:, None]) or not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "A prompt is empty, or has padding elsewhere than on its left. Pad on the left (tokenizer.padding_side = "
            "'left')."
        )
    return first


def _by_row(given: Sequence[ExitSettings], num_rows: int) -> list[ExitSettings]:
    """Settings of every row, given one for all, or one per prompt (of which each may have several rows).

    Raises:
        ValueError: Another number, or settings that rows of one batch cannot have side by side.
    """
    if not given or num_rows % len(given):
        raise ValueError(f"exit_policy has {len(given)} settings for {num_rows} rows. Give one, or one per prompt.")
    alike = {(type(each.policy), each.policy.vocabulary, each.kv, each.layers, each.adapt) for each in given}
    if len(alike) > 1:
        raise ValueError(
            "The rows of a batch share one kind of policy, vocabulary, kv, layers and adapt; only thresholds, "
            "min_depth, max_pending and decay may differ. Generate unlike ones in calls of their own."
        )
    return [each for each in given for _ in range(num_rows // len(given))]


def generate_with_exits(
    model: Any,
    input_ids: Tensor,
    *,
    settings: Sequence[ExitSettings],
    streamer: Any = None,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Any:
    """The decoding loop behind ``generate(exit_policy=…)``, called by it with all that it has prepared.

    Returns:
        Token ids ``[B, T]``, or :class:`ExitGenerateOutput` if the generation config asks for one.

    Raises:
        ValueError: Beams, settings that do not fit the model, or right padding.
    """
    if generation_config.num_beams > 1:
        raise ValueError(
            f"An exit policy works with one beam, and num_beams is {generation_config.num_beams}: beams that are "
            f"reordered would take one another's pending tokens. Leave num_beams out."
        )
    settings = _by_row(settings, len(input_ids))
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    decoder = DepthDecoder(model, settings, attention_mask, generation_config.max_length)
    pad = generation_config._pad_token_tensor
    rows = list(range(len(input_ids)))
    unfinished = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
    step = Step(input_ids.new_full((len(rows),), decoder.num_exits), decoder.prefill(input_ids), rows)
    exit_depths, all_scores, all_logits = [], [], []
    while step.rows:
        assert step.logits is not None
        scores = logits_processor(input_ids, step.logits.to(torch.float32))
        tokens = scores.argmax(-1)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        exit_depths.append(torch.where(unfinished, step.exits, -1))
        if generation_config.output_scores:
            all_scores.append(scores)
        if generation_config.output_logits:
            all_logits.append(step.logits)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, tuple(all_scores) or None)
        if input_ids.shape[1] >= generation_config.max_length:
            break
        step = decoder.step(tokens, step.rows, unfinished)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return ExitGenerateOutput(
        sequences=input_ids,
        scores=tuple(all_scores) or None,
        logits=tuple(all_logits) or None,
        exit_depths=torch.stack(exit_depths, dim=1),
        layers_run=torch.tensor(decoder.layers_run),
        block_calls=decoder.block_calls,
    )
