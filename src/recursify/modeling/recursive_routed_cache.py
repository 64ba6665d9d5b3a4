"""Keys and values of a routed model: of a recursion, only those of the tokens that went into it.

A row's *column* is the place of a token in the padded batch, and its *slot* at a depth the place of its keys there,
after those of the tokens before it that went as deep. Rows have different numbers of slots; the tensors are as wide as
the longest row's.

Shape legend: B rows of the batch, s rows in a call, n tokens in a call, w slots, T columns in all.

This file travels inside every checkpoint: it imports torch and transformers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


@dataclass
class Packing:
    """The tokens of a call that go into a recursion, put side by side.

    Attributes:
        rows: Rows of the batch ``[s]``; None for all of them.
        columns: ``[s, n]``, of this call, ascending where ``valid``. The others name tokens that stay out.
        valid: Bool ``[s, n]``; rows with fewer tokens than the longest are filled up.
        counts: How many tokens of each row of the batch go in.
        is_whole: Whether all tokens go in, so that nothing has to be moved.
    """

    rows: Tensor | None
    columns: Tensor
    valid: Tensor
    counts: list[int]
    is_whole: bool = False

    def take(self, states: Tensor) -> Tensor:
        """Of ``[B, T, ...]``, the packed ``[s, n, ...]``."""
        return states if self.is_whole else states[self._where(states)]

    def put(self, states: Tensor, packed: Tensor) -> Tensor:
        """``states [B, T, D]`` with the packed ones ``[s, n, D]`` in their places; the others are what they were."""
        if self.is_whole:
            return packed
        kept = torch.where(self.valid.unsqueeze(-1), packed, self.take(states)).to(states.dtype)
        return states.index_put(self._where(states), kept)

    def of_rows(self, by_row: Tensor) -> Tensor:
        """Of ``[B, ...]``, the rows in the call."""
        return by_row if self.rows is None else by_row[self.rows]

    def _where(self, states: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(states), device=states.device) if self.rows is None else self.rows
        return rows[:, None], self.columns


def pack(selected: Tensor, counts: list[int], *, all_rows: bool) -> Packing | None:
    """Put the ``selected [B, T]`` tokens of each row side by side, in their order.

    Args:
        selected: Which.
        counts: How many they are in each row.
        all_rows: Also rows of which none goes in, and at least one column, filled: where every process has to run the
            same layers, and every parameter has to get a gradient. Otherwise None stands for no token at all.
    """
    rows = None
    if not all_rows and 0 in counts:
        places = [row for row, count in enumerate(counts) if count]
        if not places:
            return None
        rows = torch.tensor(places, device=selected.device)
    width = max(1, *counts)
    mine = selected if rows is None else selected[rows]
    order = (~mine).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    return Packing(rows, order, mine.gather(-1, order), counts)


class RoutedCache(Cache):
    """A cache for ``generate`` with a routed model, which makes it by itself.

    Prelude and coda keep every token. A layer of the block keeps, at each depth, the tokens that went there; with
    ``shared`` keys and values, depth 0 keeps those of all, and no other depth any.

    Args:
        config: Of the model.

    Attributes:
        keys: By position, ``[B, heads, w, head size]``; no tensor has room that no row uses.
        values: Likewise.
        depths: ``[B, T]``: the last depth that each token went through; -1 where none, and in padding.
        columns: By depth, ``[B, w]``: the column of the token in each slot.
        counts: By depth: how many slots each row uses.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(layers=[])
        self.layout = config.layout
        self.shares_keys = config.router_kv == "shared"
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}
        self.counts: dict[int, list[int]] = {}
        self.depths: Tensor | None = None
        self._packing: Packing | None = None
        self._slots: tuple[Tensor, Tensor] | None = None

    def begin(self, num_rows: int, num_tokens: int, device: torch.device) -> None:
        """Take note of a call for ``num_tokens`` more columns of every row.

        Raises:
            ValueError: Another number of rows than the cache holds.
        """
        new = torch.full((num_rows, num_tokens), -1, device=device)
        if self.depths is not None and len(self.depths) != num_rows:
            raise ValueError(
                f"The cache holds {len(self.depths)} rows, and the call has {num_rows}. Give another cache."
            )
        self.depths = new if self.depths is None else torch.cat([self.depths, new], dim=1)
        self.length += num_tokens

    def home(self, depth: int) -> int:
        """The depth whose keys are attended to at ``depth``."""
        return 0 if self.shares_keys else depth

    def is_dense(self, depth: int, num_rows: int, past: int) -> bool:
        """Whether all of the first ``past`` columns have keys at ``depth``."""
        return self.counts.get(depth, [0] * num_rows) == [past] * num_rows

    def aim(self, depth: int, packing: Packing, past: int, selected: Tensor) -> None:
        """Have the layers of ``depth`` write and read for ``packing``, the tokens ``selected [B, T]`` of a call.

        Args:
            depth: Of the recursion.
            packing: What goes into it, in columns of the call.
            past: Columns before the call.
            selected: Of what goes in, what is not padding.
        """
        assert self.depths is not None
        self.depths[:, past:] += selected
        self._packing, self._slots = packing, None
        if self.home(depth) != depth:
            return
        before = self.counts.get(depth, [0] * len(selected))
        after = [old + new for old, new in zip(before, packing.counts, strict=True)]
        self.counts[depth] = after
        columns = packing.columns + past
        held = self.columns.get(depth, columns.new_zeros(len(selected), 0))
        if packing.rows is None and len({*before}) == 1 and {*packing.counts} == {columns.shape[1]}:
            self.columns[depth] = torch.cat([held, columns], dim=1)
            return
        first = packing.of_rows(torch.tensor(before, device=columns.device))
        slots = first[:, None] + torch.arange(columns.shape[1], device=columns.device)
        rows = packing.of_rows(torch.arange(len(selected), device=columns.device))[:, None].expand_as(slots)
        self._slots = rows[packing.valid], slots[packing.valid]
        held = _widened(held, 1, max(after))
        self.columns[depth] = held.index_put(self._slots, columns[packing.valid])

    def seen(self, depth: int) -> tuple[Tensor, Tensor]:
        """The columns ``[s, w]`` of the keys that the layers of ``depth`` read, and which of them there are."""
        assert self._packing is not None
        home = self.home(depth)
        columns = self._packing.of_rows(self.columns[home])[:, : self._width(home)]
        counts = self._packing.of_rows(torch.tensor(self.counts[home], device=columns.device))
        return columns, torch.arange(columns.shape[1], device=columns.device) < counts[:, None]

    def _width(self, depth: int) -> int:
        """The slots of the longest of the rows in the call."""
        assert self._packing is not None
        counts = self.counts[depth]
        if self._packing.rows is None:
            return max(counts)
        return max(count for count, new in zip(counts, self._packing.counts, strict=True) if new)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):
        """Write ``[s, heads, n, head size]`` of a layer; returns what is to be attended to."""
        slot = self.layout.layer_ref(layer_idx)
        home = layer_idx
        if slot.part == "block":
            home = self.layout.position(slot.index, self.home(slot.depth))
        if home == layer_idx:
            for store, new in ((self.keys, key_states), (self.values, value_states)):
                store[home] = self._write(store.get(home), new, slot.depth if slot.part == "block" else None)
        if slot.part != "block":
            return self.keys[home], self.values[home]
        assert self._packing is not None
        width = self._width(self.home(slot.depth))
        return tuple(self._packing.of_rows(store[home])[:, :, :width] for store in (self.keys, self.values))

    def _write(self, held: Tensor | None, new: Tensor, depth: int | None) -> Tensor:
        if depth is None or self._slots is None:
            return new if held is None else torch.cat([held, new], dim=2)
        assert self._packing is not None
        if held is None:
            held = new.new_zeros(len(self._packing.counts), new.shape[1], 0, new.shape[3])
        grown = _widened(held, 2, max(self.counts[depth]))
        grown.transpose(1, 2)[self._slots] = new.transpose(1, 2)[self._packing.valid]
        return grown

    def _rows(self, index: Tensor) -> None:
        """Have row ``i`` be what row ``index[i]`` was."""
        for store in (self.keys, self.values, self.columns):
            for name, held in store.items():
                store[name] = held.index_select(0, index.to(held.device))
        self.counts = {depth: [counts[row] for row in index.tolist()] for depth, counts in self.counts.items()}
        if self.depths is not None:
            self.depths = self.depths.index_select(0, index.to(self.depths.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams change places."""
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.depths is not None:
            self._rows(torch.arange(len(self.depths)).repeat_interleave(repeats))

    def crop(self, *_: Any, **__: Any) -> None:
        """Raises:
        ValueError: Always: what assisted decoding would take back lies at other slots in every depth.
        """
        raise ValueError("A routed model's cache cannot be cut back, so it cannot be used with an assistant.")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that have been seen, whatever went where."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Masks are made for all columns; a recursion takes from them what it needs."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no bound."""
        return -1

    get_max_cache_shape = get_max_length


def _widened(held: Tensor, axis: int, size: int) -> Tensor:
    """``held`` with at least ``size`` places along ``axis``, new ones 0."""
    missing = max(0, size - held.shape[axis])
    if not missing:
        return held
    shape = list(held.shape)
    shape[axis] = missing
    return torch.cat([held, held.new_zeros(shape)], dim=axis)
