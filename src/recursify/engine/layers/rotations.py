"""RoPE cosines and sines for rows at several depths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Rotations:
    """RoPE cosines and sines by layer. The depths of a layer may rotate differently, or not at all.

    Args:
        rotations: Output of the family's rotary embedding: cosines and sines ``[N, 1, ...]``, or a dict of those by
            layer type.
        depths: Depths ``[N]`` of the rows; None if all are at depth 0.
    """

    def __init__(self, rotations: Any, depths: Tensor | None = None) -> None:
        self._rotations, self._depths = rotations, depths
        self._mixed: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the rows of ``layer``, a :class:`~.decoder.PagedLayer`."""
        kinds, ropes = layer.kinds, layer.ropes
        if self._depths is None or (len(set(kinds)) == 1 and (all(ropes) or len(ropes) == 1)):
            return self._by_kind(kinds[0])
        if (kinds, ropes) not in self._mixed:
            cosines, sines = (torch.empty_like(table) for table in self._by_kind(kinds[0]))
            for depth, (kind, rotates) in enumerate(zip(kinds, ropes, strict=True)):
                is_here = (self._depths == depth)[:, None, None]
                cosine, sine = self._by_kind(kind)
                cosines = torch.where(is_here, cosine if rotates else torch.ones_like(cosine), cosines)
                sines = torch.where(is_here, sine if rotates else torch.zeros_like(sine), sines)
            self._mixed[kinds, ropes] = cosines, sines
        return self._mixed[kinds, ropes]

    def _by_kind(self, kind: str | None) -> tuple[Tensor, Tensor]:
        return self._rotations[kind] if isinstance(self._rotations, dict) else self._rotations
