"""Tensors by row and column for batches with rows of different progress.

A row's *column* is the place of a token in the padded batch.

Shape legend: B rows of the batch, s rows in a call, n columns in a call, T columns in all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

GROWTH = 256
"""Number of columns by which caches grow."""


class KeysAndValuesWritten(Exception):
    """Ends a layer's forward once its keys and values are in the cache, when its output is not needed."""


class ColumnCache(Cache):
    """Keys and values ``[B, heads, T, head size]`` per layer, written by row and column.

    :meth:`aim` sets where the next call writes; transformers' layers then call :meth:`update` as with any cache.
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
        """Set the ``columns [s, n]`` of ``rows [s]`` that layers write where ``valid``, to read the first ``span``.

        With ``stop`` each layer's forward ends when its keys and values are written.
        """
        self._rows, self._columns, self._valid, self._span, self._stop = rows, columns, valid, span, stop

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):
        """Write ``[s, heads, n, head size]``; returns the keys and values to attend to."""
        read = self._write(self.keys, layer_idx, key_states), self._write(self.values, layer_idx, value_states)
        if self._stop:
            raise KeysAndValuesWritten
        return read

    def _write(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        states = store.get(layer)
        if states is None:
            states = new.new_zeros(self.num_rows, new.shape[1], 0, new.shape[3])
        states = store[layer] = with_room(states, 2, self._span)
        by_column = states.transpose(1, 2)
        rows, columns, valid = (index.to(new.device) for index in (self._rows, self._columns, self._valid))
        where = (rows[:, None], columns)
        by_column[where] = torch.where(valid[..., None, None], new.transpose(1, 2), by_column[where])
        read = states if len(rows) == self.num_rows else states[rows]
        return read[:, :, : self._span]

    def copy_column(self, source: int, target: int, rows: Tensor, columns: Tensor) -> None:
        """Copy one column of each row from layer ``source`` to layer ``target``."""
        for store in (self.keys, self.values):
            copied = store[source].transpose(1, 2)[rows.to(store[source].device), columns.to(store[source].device)]
            states = store[target]
            states.transpose(1, 2)[rows.to(states.device), columns.to(states.device)] = copied.to(states.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns to attend to."""
        return self._span


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy host numbers to ``device`` without synchronizing.

    A plain copy to a GPU synchronizes, also that of a list used as an index: several times per step and segment.
    """
    tensor = torch.tensor(values, dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def with_room(tensor: Tensor, axis: int, columns: int) -> Tensor:
    """``tensor`` with at least ``columns`` along ``axis``; new ones are 0 and come :data:`GROWTH` at a time."""
    missing = columns - tensor.shape[axis]
    if missing <= 0:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.ndim - axis - 1) + (0, -(-missing // GROWTH) * GROWTH))


def pick(tensor: Tensor, places: list[int]) -> Tensor:
    """Entries at rising ``places`` of the first axis; all of them without a copy."""
    return tensor if len(places) == len(tensor) else tensor[on_device(places, tensor.device, torch.long)]


class ExitReadings:
    """Confidence and top-1 token of exits for tokens that have not run all layers yet, by exit, row and column."""

    def __init__(self, num_rows: int, num_exits: int, device: torch.device) -> None:
        self._confidence = torch.zeros(num_exits, num_rows, 0, device=device)
        self._choice = torch.zeros(num_exits, num_rows, 0, dtype=torch.long, device=device)  # the token + 1; 0 for none

    def note(self, depth: int, places: Tensor, num_columns: int, confidence: Tensor, choice: Tensor) -> None:
        """Keep ``confidence [s]`` and top-1 token ``choice [s]`` of an exit at ``places [2, s]``, rows and columns."""
        self._confidence = with_room(self._confidence, 2, num_columns)
        self._choice = with_room(self._choice, 2, num_columns)
        self._confidence[depth, places[0], places[1]] = confidence.float()
        self._choice[depth, places[0], places[1]] = choice + 1

    def pop(self, rows: Tensor, columns: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Remove and return, per exit, confidences and choices ``[s, n]`` at ``columns [s, n]``; -1 for none."""
        index = rows[:, None]
        readings = []
        for confidence, choice in zip(self._confidence, self._choice, strict=True):
            readings.append((confidence[index, columns], choice[index, columns] - 1))
            choice[index, columns] = 0
        return readings


def window_of(config: Any, position: int) -> int | None:
    """Size of the attention window of the layer at ``position``; None for full attention.

    Raises:
        ValueError: Attention of another type.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[position] not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"Layer {position} has '{kinds[position]}', and only full and sliding attention are supported."
        )
    if window is None or (kinds and kinds[position] != "sliding_attention"):
        return None
    return int(window)


def first_columns(attention_mask: Tensor) -> Tensor:
    """Column ``[B]`` of the first token of each prompt.

    Raises:
        ValueError: A prompt without tokens, with padding at its end, or with a hole.
    """
    first = attention_mask.long().argmax(-1)
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if not torch.equal(attention_mask.bool(), columns >= first[:, None]) or not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "A prompt is empty, or has padding elsewhere than on its left. Pad on the left (tokenizer.padding_side = "
            "'left')."
        )
    return first
