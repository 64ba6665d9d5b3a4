"""KV cache of a routed model: for each recursion, only the keys and values of the tokens that ran it.

A token's *column* is its place in the padded batch. Its *slot* at a depth is the place of its keys there, after those
of the earlier tokens that ran the depth. Rows have different numbers of slots; tensors are as wide as the longest row.

Shape legend: B rows of the batch, s rows in a call, n tokens in a call, w slots, T columns in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache


@dataclass
class Packing:
    """Packed tokens of a call that run a recursion.

    Attributes:
        rows: Rows of the batch ``[s]``; None for all of them.
        columns: Columns ``[s, n]`` of this call, ascending where ``valid``; the others are tokens that do not run it.
        valid: Mask ``[s, n]``; rows with fewer tokens than the longest are filled up.
        counts: Number of tokens of each row of the batch that run it.
        is_whole: Flag for a recursion of all tokens, where nothing has to be moved.
    """

    rows: Tensor | None
    columns: Tensor
    valid: Tensor
    counts: list[int]
    is_whole: bool = False

    def take(self, states: Tensor) -> Tensor:
        """Pack ``[B, T, ...]`` into ``[s, n, ...]``."""
        return states if self.is_whole else states[self._where(states)]

    def put(self, states: Tensor, packed: Tensor) -> Tensor:
        """``states [B, T, D]`` with the packed ones ``[s, n, D]`` in their places; the others are unchanged."""
        if self.is_whole:
            return packed
        kept = torch.where(self.valid.unsqueeze(-1), packed, self.take(states)).to(states.dtype)
        return states.index_put(self._where(states), kept)

    def of_rows(self, by_row: Tensor) -> Tensor:
        """Rows of ``[B, ...]`` in the call."""
        return by_row if self.rows is None else by_row[self.rows]

    def _where(self, states: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(states), device=states.device) if self.rows is None else self.rows
        return rows[:, None], self.columns


def pack(selected: Tensor, counts: list[int], *, all_rows: bool) -> Packing | None:
    """Pack the ``selected [B, T]`` tokens of each row, ``counts`` of them, in their order.

    ``all_rows`` keeps rows without tokens and at least one column, filled up, so that every process runs the same
    layers and every parameter gets a gradient. Otherwise the result is None without any token.
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
    """KV cache for ``generate`` with a routed model, which creates it by itself.

    Prelude and coda keep every token. A layer of the block keeps, at each depth, the tokens that ran it; with
    ``shared`` keys and values, depth 0 keeps those of all tokens, and the other depths none.

    Attributes:
        keys: Keys ``[B, heads, w, head size]`` by position, without unused room.
        values: Values, likewise.
        depths: Last depth ``[B, T]`` that each token ran; -1 for none, and in padding.
        columns: Column ``[B, w]`` of the token in each slot, by depth.
        counts: Number of slots that each row uses, by depth.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(layers=[])
        self.layout = config.layout
        self.shares_keys = config.router_kv == "shared"
        self.reset()

    def reset(self) -> None:
        """Clear the cache."""
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}
        self.counts: dict[int, list[int]] = {}
        self.depths: Tensor | None = None
        self._packing: Packing | None = None
        self._slots: tuple[Tensor, Tensor] | None = None

    def begin(self, num_rows: int, num_tokens: int, device: torch.device) -> None:
        """Begin a call for ``num_tokens`` more columns of every row.

        Raises:
            ValueError: A number of rows that differs from the cache's.
        """
        new = torch.full((num_rows, num_tokens), -1, device=device)
        if self.depths is not None and len(self.depths) != num_rows:
            raise ValueError(f"The cache has {len(self.depths)} rows, and the call has {num_rows}. Use a new cache.")
        self.depths = new if self.depths is None else torch.cat([self.depths, new], dim=1)
        self.length += num_tokens

    def home(self, depth: int) -> int:
        """Depth with the keys that ``depth`` attends to."""
        return 0 if self.shares_keys else depth

    def is_dense(self, depth: int, num_rows: int, past: int) -> bool:
        """Check that all of the first ``past`` columns have keys at ``depth``."""
        return self.counts.get(depth, [0] * num_rows) == [past] * num_rows

    def aim(self, depth: int, packing: Packing, past: int, selected: Tensor) -> None:
        """Set the tokens that the layers of ``depth`` write and read, ``past`` columns being before the call.

        ``selected [B, T]`` marks those of ``packing`` among the tokens of the call, without padding.
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
        old_columns = self.columns.get(depth, columns.new_zeros(len(selected), 0))
        if packing.rows is None and len({*before}) == 1 and {*packing.counts} == {columns.shape[1]}:
            self.columns[depth] = torch.cat([old_columns, columns], dim=1)
            return
        first = packing.of_rows(torch.tensor(before, device=columns.device))
        slots = first[:, None] + torch.arange(columns.shape[1], device=columns.device)
        rows = packing.of_rows(torch.arange(len(selected), device=columns.device))[:, None].expand_as(slots)
        self._slots = rows[packing.valid], slots[packing.valid]
        old_columns = _widened(old_columns, 1, max(after))
        self.columns[depth] = old_columns.index_put(self._slots, columns[packing.valid])

    def seen(self, depth: int) -> tuple[Tensor, Tensor]:
        """Columns ``[s, w]`` of the keys that the layers of ``depth`` read, and the mask of those that exist."""
        assert self._packing is not None
        home = self.home(depth)
        columns = self._packing.of_rows(self.columns[home])[:, : self._width(home)]
        counts = self._packing.of_rows(torch.tensor(self.counts[home], device=columns.device))
        return columns, torch.arange(columns.shape[1], device=columns.device) < counts[:, None]

    def _width(self, depth: int) -> int:
        """Number of slots of the longest row in the call."""
        assert self._packing is not None
        counts = self.counts[depth]
        if self._packing.rows is None:
            return max(counts)
        return max(count for count, new in zip(counts, self._packing.counts, strict=True) if new)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):
        """Write ``[s, heads, n, head size]`` of a layer; returns the keys and values to attend to."""
        ref = self.layout.layer_ref(layer_idx)
        depth = self.home(ref.depth) if ref.part == "block" else None
        home = layer_idx if depth is None else self.layout.position(ref.index, depth)
        if home == layer_idx:
            for store, new in ((self.keys, key_states), (self.values, value_states)):
                store[home] = self._write(store.get(home), new, depth)
        if depth is None:
            return self.keys[home], self.values[home]
        assert self._packing is not None
        width = self._width(depth)
        return tuple(self._packing.of_rows(store[home])[:, :, :width] for store in (self.keys, self.values))

    def _write(self, states: Tensor | None, new: Tensor, depth: int | None) -> Tensor:
        if depth is None or self._slots is None:
            return new if states is None else torch.cat([states, new], dim=2)
        assert self._packing is not None
        if states is None:
            states = new.new_zeros(len(self._packing.counts), new.shape[1], 0, new.shape[3])
        grown = _widened(states, 2, max(self.counts[depth]))
        grown.transpose(1, 2)[self._slots] = new.transpose(1, 2)[self._packing.valid]
        return grown

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace row ``i`` by row ``indices[i]``."""
        for store in (self.keys, self.values, self.columns):
            for name, states in store.items():
                store[name] = states.index_select(0, indices.to(states.device))
        self.counts = {depth: [counts[row] for row in indices.tolist()] for depth, counts in self.counts.items()}
        if self.depths is not None:
            self.depths = self.depths.index_select(0, indices.to(self.depths.device))

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.depths is not None:
            self.batch_select_indices(torch.arange(len(self.depths)).repeat_interleave(repeats))

    def crop(self, *_: Any, **__: Any) -> None:
        """Refuse assisted decoding, whose rejected tokens are in different slots at every depth."""
        raise ValueError("A routed model's cache cannot be cut back, so it cannot be used with an assistant.")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns, whatever depths their tokens ran."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Mask size for all columns; a recursion takes its part of the mask."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Maximum length: -1, unlimited."""
        return -1

    get_max_cache_shape = get_max_length


def _widened(tensor: Tensor, axis: int, size: int) -> Tensor:
    """``tensor`` with at least ``size`` places along ``axis``, new ones 0."""
    missing = size - tensor.shape[axis]
    return tensor if missing <= 0 else F.pad(tensor, (0, 0) * (tensor.ndim - axis - 1) + (0, missing))
