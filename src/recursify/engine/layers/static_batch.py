"""Attention batch with static shapes, whose contents only the device knows.

It has the interface of :class:`~.batch.AttentionBatch`, but its shapes do not depend on the requests, so a CUDA graph
can capture the call. Nothing here synchronizes with the device.

Shape legend: N rows, some of them unused; M pages of a request; R depths; H query heads; K key heads; D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from recursify.kernels.dispatch import Implementation
from recursify.kernels.kv_write import store_keys_and_values
from recursify.kernels.paged_attention import attend_pages

from .decoder import PagedLayer


@dataclass(frozen=True)
class StaticAttentionBatch:
    """Rows of one call.

    Attributes:
        positions: Positions ``[N]``; 0 for unused rows.
        depths: Depths ``[N]``; 0 for unused rows, and in prelude and coda.
        slots: KV slots ``[N]``, page id · page size + index in the page, before a depth's offset; -1 for none.
        lengths: Numbers of visible keys ``[N]``; 0 for unused rows.
        block_tables: Page ids ``[N, M]`` before a depth's offset.
        page_offsets: Offset of each depth in pages, ``[R]``; ``[0]`` in prelude and coda.
        windows: Mapping from a layer's windows to a tensor ``[R]`` of them, 0 for none; None if no depth has one.
            Built in advance, because capturing a CUDA graph forbids host-to-device copies.
        implementation: Implementation of the kernels.
        only_writes: True to end every layer after its KV-cache write.
        rope_lengths: Always None, since RoPE does not depend on the length here (``checks.loop_obstacle``).
    """

    positions: Tensor
    depths: Tensor
    slots: Tensor
    lengths: Tensor
    block_tables: Tensor
    page_offsets: Tensor
    windows: dict[tuple[int | None, ...], Tensor | None]
    implementation: Implementation
    only_writes: bool = False
    rope_lengths: None = None
    _row_windows: dict[tuple[int | None, ...], Tensor | None] = field(default_factory=dict, repr=False)

    def store(self, layer: PagedLayer, key: Tensor, value: Tensor) -> None:
        """Write ``key`` and ``value [N, K, D]`` to the rows' KV slots."""
        store_keys_and_values(
            *(key, value, layer.keys, layer.values, self.slots, self.depths, self.page_offsets),
            implementation=self.implementation,
        )

    def attend(self, layer: PagedLayer, query: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attend with ``query [N, H, D]`` to the rows' visible keys: ``[N, H, D]``, 0 for unused rows."""
        return attend_pages(
            *(query, layer.keys, layer.values, self.block_tables, self.depths, self.page_offsets, self.lengths),
            scale=scale,
            window=self._window(layer.windows),
            softcap=softcap,
            implementation=self.implementation,
        )

    def _window(self, windows: tuple[int | None, ...]) -> Tensor | None:
        """Window of each row, ``[N]``."""
        if windows not in self._row_windows:
            by_depth = self.windows[windows]
            self._row_windows[windows] = (
                None if by_depth is None else by_depth[self.depths.clamp(max=len(by_depth) - 1)]
            )
        return self._row_windows[windows]
