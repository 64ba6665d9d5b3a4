"""Decoding in which every row of a batch exits on its own, with exact keys and values for the layers it skipped.

The layers are cut into segments at the exits. A row's *column* is the place of a token in the padded batch. For every
row and segment the decoder counts the columns that have run it (``done``): a prefix, since a token can run a segment
only after all tokens before it. A token that exits defers later segments; the next token of its row that runs them runs
all deferred ones in the same call (FREE's synchronized parallel decoding, arXiv 2310.05424), so that their keys and
values are those of a full forward. Rows need different numbers of tokens in such a call: the shorter ones are padded on
the left and write nothing there.

Shape legend: B rows of the batch, s rows in a call, n columns in a call, D hidden size, V vocabulary, T columns in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .recursive_columns import (
    ColumnCache,
    ExitReadings,
    KeysAndValuesWritten,
    first_columns,
    on_device,
    pick,
    window_of,
    with_room,
)
from .recursive_exit_settings import ExitSettings, check_depths, layers_before_exits
from .recursive_policies import ExitContext, ExitLimits, decide_exits
from .recursive_rope import fixed_rope


class DepthDecoder:
    """Decoder that runs each token of a batch as deep as it needs, for one call of ``generate``.

    Args:
        model: A ``RecursiveForCausalLM`` without a configured exit depth.
        settings: Exit settings per row, alike but for thresholds, minimum depth, pending tokens and decay.
        attention_mask: Mask ``[B, T]`` of the prompt, 0 in the padding on its left.
        max_length: Maximum number of columns.

    Raises:
        ValueError: A model that cannot exit as asked.
    """

    def __init__(self, model: Any, settings: Sequence[ExitSettings], attention_mask: Tensor, max_length: int) -> None:
        self.model = model
        self.settings = list(settings)
        self.layout = model.config.layout
        cuts = layers_before_exits(model, self.settings[0])
        self.num_exits = len(cuts)
        for row_settings in self.settings:
            check_depths(row_settings, self.num_exits)
        self.segments = [range(start, end) for start, end in pairwise([0, *cuts, self.layout.num_layers])]
        exits_run_coda = self.settings[0].layers is None and model.config.exit_through_coda
        self.exit_coda = self.layout.coda_positions if exits_run_coda else range(0)
        self.prompt_length = attention_mask.shape[1]
        self.max_length = max_length
        num_rows = len(attention_mask)
        self.cache = ColumnCache(num_rows)
        self.first = first_columns(attention_mask)
        unpadded = self.prompt_length - int(self.first.min())
        self.rotary = fixed_rope(model.model.rotary_emb, unpadded, unpadded + max_length - 1 - self.prompt_length)
        self.columns = [self.prompt_length - 1] * num_rows
        self.done = [self.first.tolist() for _ in self.segments]
        self.layers_run = [0] * num_rows
        self.block_calls = 0
        # Input of each segment, by column: embeddings, then states at the exits.
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
        """Run all layers on the prompt ``[B, T]``; returns logits ``[B, V]``."""
        rows, device = list(range(len(input_ids))), input_ids.device
        columns = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
        self._put(torch.arange(len(rows), device=device), columns, input_ids)
        for segment in range(len(self.segments)):
            states = self.advance(segment, rows)[:, -1]
        self.layers_run = [0] * len(rows)
        self.block_calls = 0
        return self.compute_logits(states)

    def append(self, tokens: Tensor, rows: list[int]) -> None:
        """Append the next token of each of ``rows``; ``tokens [B]``."""
        for row in rows:
            self.columns[row] += 1
        index, columns = self._places(rows)
        self._put(index, columns[:, None], tokens[index][:, None])

    def advance(self, segment: int, rows: list[int]) -> Tensor:
        """Run ``segment`` for the last tokens of ``rows`` and the deferred ones before them; states ``[s, n, D]``.

        The last column of each row comes last; rows with fewer deferred tokens are padded on the left.
        """
        last, done = [self.columns[row] for row in rows], [self.done[segment][row] for row in rows]
        width = max(column + 1 - start for column, start in zip(last, done, strict=True))
        index, columns, done = on_device([rows, last, done], self.first.device)
        columns = columns[:, None] + torch.arange(1 - width, 1, device=self.first.device)
        valid = columns >= done[:, None]
        columns = columns.clamp(min=0)
        states = self.entering[segment][index[:, None], columns]
        states = self._run(self.segments[segment], states, index, columns, valid)
        if segment + 1 < len(self.segments):
            entering = self._reserve(segment + 1)
            where = (index[:, None], columns)
            entering[where] = torch.where(valid[..., None], states.to(entering.device), entering[where])
        for row in rows:
            self.done[segment][row] = self.columns[row] + 1
            self.layers_run[row] += len(self.segments[segment])
        self.block_calls += 1
        return states

    def _run(
        self, positions: Sequence[int], states: Tensor, rows: Tensor, columns: Tensor, valid: Tensor, stop: bool = False
    ) -> Tensor:
        """Run the layers at ``positions`` on ``states [s, n, D]``.

        With ``stop`` each layer gets the same states and ends when its keys and values are written.
        """
        base = self.model.model
        span = max(self.columns) + 1
        position_ids = (columns - self.first[rows][:, None]).clamp(min=0)
        rotations = base.rotations(states, position_ids, self.rotary)
        masks: dict[int | None, Tensor] = {}
        self.cache.aim(rows, columns, valid, span, stop=stop)
        for position in positions:
            window = window_of(self.model.config, position)
            if window not in masks:
                masks[window] = self._mask(states, rows, columns, span, window)
            try:
                states = base.run_layer(
                    position,
                    states,
                    masks=masks[window],
                    rotations=rotations,
                    position_ids=position_ids,
                    kv_cache=self.cache,
                    use_cache=True,
                )
            except KeysAndValuesWritten:
                continue
        return states

    def _mask(self, states: Tensor, rows: Tensor, columns: Tensor, span: int, window: int | None) -> Tensor:
        """Additive attention mask ``[s, 1, n, span]``: 0 for visible keys, the lowest number elsewhere."""
        keys = torch.arange(span, device=columns.device)
        visible = (keys <= columns[..., None]) & (keys >= self.first[rows][:, None, None])
        if window is not None:
            visible &= columns[..., None] - keys < window
        mask = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
        return mask.masked_fill(~visible, torch.finfo(states.dtype).min)[:, None]

    # --- Exiting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: Tensor, rows: list[int], unfinished: Tensor) -> Step:
        """Run the next token of every row, of ``tokens [B]``, as deep as it needs.

        Of the ``rows`` of the step before, those ``unfinished`` (bool ``[B]``, on the device) run. That mask is copied
        to the host together with the first exit's decisions, since every copy synchronizes.
        """
        policy, cost = self.settings[0].policy, list(self.layers_run)
        self.append(tokens, rows)
        outcome = Step(tokens.new_full(tokens.shape, self.num_exits))
        top_tokens: list[Tensor] = []
        before: Tensor | None = None
        for depth in range(self.num_exits):
            states = self.advance(depth, rows)[:, -1]
            context = self._context(depth, states, rows, before)
            here = unfinished if len(rows) == len(unfinished) else unfinished[self._places(rows)[0]]
            goes_on, is_exiting = torch.stack([here, self._decide(context, rows)]).tolist()
            for row in [row for row, on in zip(rows, goes_on, strict=True) if not on]:
                self.rewind(row, 1)
                self.layers_run[row] = cost[row]
            exiting = [place for place in range(len(rows)) if goes_on[place] and is_exiting[place]]
            staying = [place for place in range(len(rows)) if goes_on[place] and not is_exiting[place]]
            if exiting:
                exited = [rows[place] for place in exiting]
                outcome.add(exited, self._exit_logits(context, exiting, exited), depth)
                self._fill_skipped(depth, pick(states, exiting), exited)
            rows = [rows[place] for place in staying]
            if policy.simulated:
                top_tokens.append(pick(context.logits.argmax(-1), staying))
            if policy.needs_previous_logits:
                before = pick(context.logits, staying)
            if not rows:
                return outcome
        outcome.add(rows, self._last_logits(self.advance(self.num_exits, rows), rows), self.num_exits)
        if top_tokens:
            assert outcome.logits is not None
            index = self._places(rows)[0]
            last = outcome.logits[index].argmax(-1)
            for depth in reversed(range(self.num_exits)):
                outcome.exits[index] = torch.where(top_tokens[depth] == last, depth, outcome.exits[index])
        return outcome

    def _last_logits(self, states: Tensor, rows: list[int]) -> Tensor:
        """Logits ``[s, V]`` of the last tokens, given the last segment's output ``[s, n, D]``, all to learn from."""
        if self.learning is None:
            return self.compute_logits(states[:, -1])
        logits = self.compute_logits(states)
        index, last = self._places(rows)
        columns = last[:, None] + torch.arange(1 - states.shape[1], 1, device=last.device)
        for depth, (confidence, choice) in enumerate(self.readings.pop(index, columns.clamp(min=0))):
            self.learning.learn(depth, confidence, choice == logits.argmax(-1), choice >= 0)
        return logits[:, -1]

    def _decide(self, context: ExitContext, rows: list[int]) -> Tensor:
        """Decide which of ``rows`` exit, bool ``[s]``."""
        depth = context.depth
        limits = [self._limits(row, depth) for row in rows]
        if self.learning is None and not any(decide_exits(math.inf, row) for row in limits):
            return torch.zeros(len(rows), dtype=torch.bool, device=context.states.device)
        confidence = self.settings[0].policy.confidence(context)
        if self.learning is not None:
            columns = max(self.columns) + 1
            self.readings.note(depth, self._places(rows), columns, confidence, context.all_logits.argmax(-1))
        by_name = on_device(list(zip(*limits, strict=True)), confidence.device, torch.float32)
        return decide_exits(confidence, ExitLimits(*by_name))

    def _limits(self, row: int, depth: int) -> ExitLimits:
        """The limits of the last token of ``row`` after ``depth``."""
        settings, steps = self.settings[row], max(self.max_length - self.prompt_length, 1)
        threshold = math.inf  # a simulated policy decides when all depths have run
        if not settings.policy.simulated:
            threshold = settings.threshold_at(depth, self.num_exits, self.columns[row] - self.prompt_length, steps)
        pending = self.columns[row] + 1 - self.done[-1][row] if settings.kv == "deferred" else 0
        return ExitLimits(depth, self.num_exits, threshold, settings.min_depth, pending, settings.max_pending)

    def _context(self, depth: int, states: Tensor, rows: list[int], before: Tensor | None) -> ExitContext:
        index, columns = self._places(rows)
        heads = self.model.exit_heads if self.settings[0].layers is None else None
        return ExitContext(
            depth,
            states,
            previous=self.entering[depth][index, columns],
            arrive=lambda: self._to_exit(states, rows),
            read=lambda exit_states, vocabulary: self._head_logits(depth, exit_states, vocabulary),
            previous_logits=before,
            test=None if heads is None else lambda: heads[depth].agreement(states),
            vocabulary=self.settings[0].policy.vocabulary,
        )

    def _exit_logits(self, context: ExitContext, places: list[int], rows: list[int]) -> Tensor:
        """The exit's logits for ``rows``, at ``places`` in the context; computed for them alone unless known."""
        logits, exit_states = context.known("all_logits"), context.known("exit_states")
        if logits is not None:
            return pick(logits, places)
        if exit_states is None:
            return self.compute_exit_logits(context.depth, pick(context.states, places), rows)
        return self._head_logits(context.depth, pick(exit_states, places))

    def compute_exit_logits(self, depth: int, states: Tensor, rows: list[int]) -> Tensor:
        """Logits ``[s, V]`` of an exit, given the states ``[s, D]`` there."""
        return self._head_logits(depth, self._to_exit(states, rows))

    def _to_exit(self, states: Tensor, rows: list[int]) -> Tensor:
        """Input ``[s, D]`` of an exit head, given the states there."""
        return self._run_last(self.exit_coda, states, rows) if self.exit_coda else states

    def _head_logits(self, depth: int, exit_states: Tensor, vocabulary: int | None = None) -> Tensor:
        if self.settings[0].layers is not None:
            return self.compute_logits(exit_states, vocabulary)
        return self.model.compute_exit_logits(depth, exit_states, vocabulary)

    def compute_logits(self, states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[..., V]`` of the whole model, given the last segment's output ``[..., D]``."""
        return self.model.compute_logits(self.model.model.norm(states), vocabulary)

    def _run_last(self, positions: Sequence[int], states: Tensor, rows: list[int], stop: bool = False) -> Tensor:
        """Run layers for the last token of each of ``rows``: ``[s, D] -> [s, D]``."""
        index, columns = self._places(rows)
        for row in () if stop else rows:
            self.layers_run[row] += len(positions)
        valid = torch.ones_like(columns[:, None], dtype=torch.bool)
        return self._run(positions, states[:, None], index, columns[:, None], valid, stop)[:, -1]

    def _fill_skipped(self, depth: int, states: Tensor, rows: list[int]) -> None:
        """Write the KV cache of the layers that ``rows`` skip, as the KV mode requires."""
        kv = self.settings[0].kv
        if kv == "deferred":
            return
        skipped = [position for segment in self.segments[depth + 1 :] for position in segment]
        skipped = [position for position in skipped if position not in self.exit_coda]
        if kv == "latest":
            index, columns = self._places(rows)
            for position in skipped:
                ref = self.layout.layer_ref(position)
                if ref.part == "block":
                    self.cache.copy_column(self.layout.position(ref.index, depth), position, index, columns)
            skipped = [position for position in skipped if self.layout.layer_ref(position).part == "coda"]
        self._run_last(skipped, states, rows, stop=True)
        for done in self.done[depth + 1 :]:
            for row in rows:
                done[row] = self.columns[row] + 1

    # --- Columns -------------------------------------------------------------------------------------------------

    def _places(self, rows: list[int]) -> Tensor:
        """Index ``[2, s]``: ``rows`` and the last column of each."""
        return on_device([rows, [self.columns[row] for row in rows]], self.first.device)

    def _put(self, rows: Tensor, columns: Tensor, tokens: Tensor) -> None:
        """Embed ``tokens [s, n]`` into ``columns [s, n]`` of ``rows [s]``."""
        entering = self._reserve(0)
        entering[rows[:, None], columns] = self.model.get_input_embeddings()(tokens).to(entering.device)

    def _reserve(self, segment: int) -> Tensor:
        """Input of ``segment``, with room for all columns."""
        self.entering[segment] = with_room(self.entering[segment], 1, max(self.columns) + 1)
        return self.entering[segment]

    def rewind(self, row: int, count: int) -> None:
        """Drop the last ``count`` tokens of ``row``; later ones overwrite their cache entries."""
        self.columns[row] -= count
        for done in self.done:
            done[row] = min(done[row], self.columns[row] + 1)


@dataclass
class Step:
    """Result of one step.

    Attributes:
        exits: Exit ``[B]`` of each row, as in ``ExitGenerateOutput``.
        logits: Logits ``[B, V]`` of the rows that ran; None without any.
        rows: Rows that ran.
    """

    exits: Tensor
    logits: Tensor | None = None
    rows: list[int] = field(default_factory=list)

    def add(self, rows: list[int], logits: Tensor, exit: int) -> None:
        """Record that ``rows`` took ``exit``, with ``logits [s, V]``."""
        if self.logits is None:
            self.logits = logits.new_zeros(len(self.exits), logits.shape[-1])
        if len(rows) == len(self.exits):
            self.logits, self.exits = logits, torch.full_like(self.exits, exit)
        else:
            index = on_device(rows, logits.device)
            self.logits[index] = logits
            self.exits[index] = exit
        self.rows = sorted([*self.rows, *rows])
