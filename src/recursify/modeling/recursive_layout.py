"""The only arithmetic between effective positions, stored layers and depths.

A dense model of ``L`` layers becomes ``prelude`` + a shared block applied ``R`` times + ``coda``. Three numberings
meet here and nowhere else:

- **position**: index of an *effective* layer, ``0 .. L-1``. Caches, masks and RoPE know only this one.
- **block layer**: index inside the shared block, ``0 .. block_size-1``.
- **depth**: which recursion a block layer is in, ``0 .. R-1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
"""Sharing schemes by their papers' names (RRT section 2, MoR table 1); ``middle_*``: one prelude and one coda layer."""

Part = Literal["prelude", "block", "coda"]


class LayoutError(ValueError):
    """Depth that does not fold as asked, or layers that cannot be tied."""


@dataclass(frozen=True, slots=True)
class LayerRef:
    """Layer at a position: its ``part``, its ``index`` in that part, and the ``depth`` that it runs at."""

    part: Part
    index: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """Map from ``num_layers`` effective positions to stored layers.

    ``order="cycle"`` runs the whole block, then again (``A B A B``); ``order="sequence"`` runs each layer
    ``num_recursions`` times before the next (``A A B B``). Only a cycle has recursion boundaries.
    """

    num_prelude_layers: int
    block_size: int
    num_recursions: int
    num_coda_layers: int
    order: Literal["cycle", "sequence"] = "cycle"

    def __post_init__(self) -> None:
        if self.num_recursions < 1:
            raise LayoutError(f"num_recursions must be at least 1, got {self.num_recursions}.")
        if self.block_size < 1:
            raise LayoutError(f"The shared block must have at least one layer, got block_size={self.block_size}.")
        if self.num_prelude_layers < 0 or self.num_coda_layers < 0:
            raise LayoutError(
                f"Prelude and coda cannot be negative, got {self.num_prelude_layers} and {self.num_coda_layers}."
            )
        if self.order not in ("cycle", "sequence"):
            raise LayoutError(f"Unknown order '{self.order}'. Use 'cycle' or 'sequence'.")

    @classmethod
    def fold(
        cls,
        num_layers: int,
        num_recursions: int,
        sharing: str = "middle_cycle",
        *,
        num_prelude_layers: int | None = None,
        num_coda_layers: int | None = None,
    ) -> LayerLayout:
        """Fold ``num_layers`` dense layers into ``num_recursions`` applications of a shared block.

        Args:
            num_layers: Number of layers of the dense model.
            num_recursions: Number of applications of the shared block, at least 1.
            sharing: Sharing scheme, one of :data:`SHARINGS`.
            num_prelude_layers: Unshared layers before the block; None takes the scheme's own, 0 or 1.
            num_coda_layers: Unshared layers after the block, likewise.

        Raises:
            LayoutError: The inner depth does not divide; the message lists the nearest folds that do.
        """
        if sharing not in SHARINGS:
            raise LayoutError(f"Unknown sharing '{sharing}'. Use one of: {', '.join(SHARINGS)}.")
        if num_recursions < 1:
            raise LayoutError(f"num_recursions must be at least 1, got {num_recursions}.")
        own = 1 if sharing.startswith("middle_") else 0
        prelude = own if num_prelude_layers is None else num_prelude_layers
        coda = own if num_coda_layers is None else num_coda_layers
        inner = num_layers - prelude - coda
        if prelude < 0 or coda < 0 or inner < 1:
            raise LayoutError(
                f"{num_layers} layers less a prelude of {prelude} and a coda of {coda} leave {inner} to share. "
                f"Choose a non-negative prelude and coda that leave at least one layer."
            )
        if inner % num_recursions:
            raise LayoutError(
                f"Cannot fold {num_layers} layers into {num_recursions} recursions: {num_layers} - prelude {prelude} "
                f"- coda {coda} = {inner}, which is not divisible by {num_recursions}. "
                f"The nearest that fit: {_nearest_folds(num_layers, num_recursions, prelude, coda)}."
            )
        return cls(
            num_prelude_layers=prelude,
            block_size=inner // num_recursions,
            num_recursions=num_recursions,
            num_coda_layers=coda,
            order="sequence" if sharing.endswith("sequence") else "cycle",
        )

    @property
    def num_layers(self) -> int:
        """Effective depth: the number of positions."""
        return self.num_prelude_layers + self.block_size * self.num_recursions + self.num_coda_layers

    @property
    def num_unique_layers(self) -> int:
        """Stored layers."""
        return self.num_prelude_layers + self.block_size + self.num_coda_layers

    def layer_ref(self, position: int) -> LayerRef:
        """Layer that runs at ``position``."""
        if not 0 <= position < self.num_layers:
            raise IndexError(f"Position {position} is outside 0 .. {self.num_layers - 1}.")
        inner = position - self.num_prelude_layers
        if inner < 0:
            return LayerRef("prelude", position, 0)
        if inner >= self.block_size * self.num_recursions:
            return LayerRef("coda", inner - self.block_size * self.num_recursions, 0)
        if self.order == "cycle":
            return LayerRef("block", inner % self.block_size, inner // self.block_size)
        return LayerRef("block", inner // self.num_recursions, inner % self.num_recursions)

    def layer_refs(self) -> Iterator[LayerRef]:
        """Layers at all positions, in the order in which the model runs them."""
        return (self.layer_ref(position) for position in range(self.num_layers))

    def position(self, index: int, depth: int) -> int:
        """Position of block layer ``index`` at ``depth``."""
        if self.order == "cycle":
            return self.num_prelude_layers + depth * self.block_size + index
        return self.num_prelude_layers + index * self.num_recursions + depth

    def positions(self, index: int) -> list[int]:
        """Positions of block layer ``index``, by depth."""
        return [self.position(index, depth) for depth in range(self.num_recursions)]

    def layers_before(self, depth: int) -> int:
        """Number of layers that have run at the boundary after ``depth``; only a cycle has boundaries."""
        return self.position(self.block_size - 1, depth) + 1

    def sources(self, depths: Sequence[int]) -> list[int]:
        """Map the positions of a layout of ``len(depths)`` recursions to positions here that run the same layer.

        Its depth ``i`` is the depth ``depths[i]`` here.
        """
        outside = {"prelude": range(self.num_prelude_layers), "coda": self.coda_positions}
        return [
            self.position(ref.index, depths[ref.depth]) if ref.part == "block" else outside[ref.part][ref.index]
            for ref in replace(self, num_recursions=len(depths)).layer_refs()
        ]

    @property
    def coda_positions(self) -> range:
        """Positions of the coda."""
        return range(self.num_layers - self.num_coda_layers, self.num_layers)

    def layer_to_block(self) -> list[int]:
        """Index of the stored layer at every position: prelude first, then the block, then the coda."""
        offset = {"prelude": 0, "block": self.num_prelude_layers, "coda": self.num_prelude_layers + self.block_size}
        return [offset[ref.part] + ref.index for ref in self.layer_refs()]

    def __str__(self) -> str:
        each = ", each" if self.order == "sequence" else ""
        block = f"({self.block_size} layers{each} × {self.num_recursions})"
        return f"{self.num_prelude_layers} + {block} + {self.num_coda_layers}"


def _nearest_folds(num_layers: int, num_recursions: int, prelude: int, coda: int) -> str:
    """Up to four ways to make the fold work, nearest first, as the user would type them."""
    inner = num_layers - prelude - coda
    divisors = (r for r in range(2, inner + 1) if inner % r == 0)
    recursions = sorted(divisors, key=lambda r: (abs(r - num_recursions), r))
    ends = [
        (p, c) for p in range(num_layers) for c in range(num_layers - p) if (num_layers - p - c) % num_recursions == 0
    ]
    ends.sort(key=lambda end: (abs(end[0] - prelude) + abs(end[1] - coda), abs(end[0] - end[1])))
    ways = [f"--recursions {r}" for r in recursions[:2]] + [f"--prelude {p} --coda {c}" for p, c in ends[:2]]
    return ", ".join(ways) if ways else "--recursions 1"
