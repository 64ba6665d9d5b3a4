"""Rows of which the host knows only how many there can be: who they are, where, and how deep, the device knows.

The same for a call's layers as :class:`~.batch.AttentionBatch`, with shapes that do not depend on what there is to do,
so that a call can be captured in a CUDA graph. Nothing here waits for the device.

Shape legend: N rows, some of which may not be there; M pages of a request; R depths.
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
    """Of one call.

    Attributes:
        positions: ``[N]``; 0 where there is no row.
        depths: ``[N]``; 0 where there is no row, and in prelude and coda.
        slots: ``[N]``, where keys go: ``page id · page size + place``, before the offset of a depth; -1 for nowhere.
        lengths: ``[N]``, how many keys a row sees; 0 where there is no row.
        tables: ``[N, M]``, page ids before the offset of a depth.
        offsets: ``[R]``, of the depths, in pages; ``[0]`` in prelude and coda.
        reaches: By a layer's windows, how far it looks back at each depth, ``[R]``, 0 for all the way; made beforehand,
            since numbers cannot be brought to a device while a graph is captured.
        implementation: Of the kernels.
        only_writes: End every layer when its keys and values are written.
    """

    positions: Tensor
    depths: Tensor
    slots: Tensor
    lengths: Tensor
    tables: Tensor
    offsets: Tensor
    reaches: dict[tuple[int | None, ...], Tensor | None]
    implementation: Implementation
    only_writes: bool = False
    _windows: dict[tuple[int | None, ...], Tensor | None] = field(default_factory=dict, repr=False)

    def store(self, layer: PagedLayer, key: Tensor, value: Tensor) -> None:
        """Write ``key`` and ``value [N, K, D]`` to the rows' slots."""
        store_keys_and_values(
            key,
            value,
            layer.keys,
            layer.values,
            self.slots,
            self.depths,
            self.offsets,
            implementation=self.implementation,
        )

    def attend(self, layer: PagedLayer, query: Tensor, scale: float, softcap: float | None) -> Tensor:
        """``query [N, H, D]`` over the keys that the rows see: ``[N, H, D]``; 0 where there is no row."""
        return attend_pages(
            query,
            layer.keys,
            layer.values,
            self.tables,
            self.depths,
            self.offsets,
            self.lengths,
            scale=scale,
            window=self._window(layer.windows),
            softcap=softcap,
            implementation=self.implementation,
        )

    def _window(self, windows: tuple[int | None, ...]) -> Tensor | None:
        """By row, ``[N]``."""
        if windows not in self._windows:
            reach = self.reaches[windows]
            self._windows[windows] = None if reach is None else reach[self.depths.clamp(max=len(reach) - 1)]
        return self._windows[windows]
