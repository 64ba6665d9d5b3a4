"""Runs layers on rows: the only part of the engine that calls the model.

Shape legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import AttentionBatch, TokenSpan
from .decoder import DecoderAdapter, PagedLayer
from .kv_cache import KVCache
from .mixed_depth import use_norm_kernel
from .paged_attention import KeysAndValuesWritten
from .static_batch import StaticAttentionBatch


class ModelRunner:
    """The model and its pages.

    Args:
        decoder: Of the model.
        pages: Of keys and values.
        kernels: Have Triton write keys and attend to them, and norm rows of all depths.
    """

    def __init__(self, decoder: DecoderAdapter, pages: KVCache, *, kernels: bool = False) -> None:
        self.decoder, self.kv_cache, self.kernels = decoder, pages, kernels
        self.device = decoder.device
        if kernels:
            use_norm_kernel(layer.module for layer in decoder.block)

    def enter(self, ids: Tensor, runs: Sequence[TokenSpan]) -> tuple[Tensor, Tensor]:
        """Embed ``ids [N]`` and run the prelude: the embeddings and what enters the block, each ``[N, D]``."""
        embedded = self.decoder.embed(ids[:, None])[:, 0]
        return embedded, self.run(self.decoder.prelude, runs, embedded)

    def block(self, runs: Sequence[TokenSpan], states: Tensor) -> Tensor:
        """One call of the shared block, ``[N, D] -> [N, D]``; ``runs`` are sorted by depth."""
        return self.run(self.decoder.block, runs, states)

    def coda(self, runs: Sequence[TokenSpan], states: Tensor) -> Tensor:
        """The coda, ``[N, D] -> [N, D]``, not normed."""
        return self.run(self.decoder.coda, runs, states)

    def write_only(self, layers: Sequence[PagedLayer], runs: Sequence[TokenSpan], states: Tensor) -> None:
        """Have each of ``layers`` project keys and values of the same ``states [N, D]``, and no more."""
        self.run(layers, runs, states, only_writes=True)

    def run(
        self, layers: Sequence[PagedLayer], runs: Sequence[TokenSpan], states: Tensor, *, only_writes: bool = False
    ) -> Tensor:
        """``layers`` one after the other on ``states [N, D]``."""
        if not layers or not len(states):
            return states
        rows = AttentionBatch(runs, self.kv_cache, kernels=self.kernels, only_writes=only_writes)
        self.decoder.depth_context.set(_counts(runs), self.device)
        return self._run(layers, rows, states)

    def run_static(self, layers: Sequence[PagedLayer], rows: StaticAttentionBatch, states: Tensor) -> Tensor:
        """The same of rows that only the device knows; nothing waits for it."""
        if not layers:
            return states
        self.decoder.depth_context.set_on_device(rows.depths)
        return self._run(layers, rows, states)

    def _run(self, layers: Sequence[PagedLayer], rows: AttentionBatch | StaticAttentionBatch, states: Tensor) -> Tensor:
        hidden = states[:, None]
        positions = rows.positions[:, None]
        rotations = Rotations(self.decoder.rotate(hidden, positions), rows.depths)
        for layer in layers:
            try:
                hidden = layer.module(
                    hidden,
                    attention_mask=None,
                    position_embeddings=rotations.of(layer),
                    position_ids=positions,
                    use_cache=False,
                    paged=(rows, layer),
                )
            except KeysAndValuesWritten:
                continue
        return hidden[:, 0]

    def compute_logits(self, states: Tensor) -> Tensor:
        """Logits ``[N, V]`` of what the last layer puts out."""
        return self.decoder.compute_logits(self.decoder.norm(states))

    def compute_exit_logits(self, depth: int, states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[N, V]`` of the exit after ``depth``."""
        return self.decoder.model.compute_exit_logits(depth, states, vocabulary)


def _counts(runs: Sequence[TokenSpan]) -> list[tuple[int, int]]:
    """Depths of the rows in their order, and how many rows each has."""
    counts: dict[int, int] = {}
    for run in runs:
        depth = run.depth or 0
        counts[depth] = counts.get(depth, 0) + len(run.positions)
    return list(counts.items())


class Rotations:
    """RoPE's cosines and sines by layer, where depths of a layer may have several kinds, or none.

    Args:
        made: What the family makes: cosines and sines ``[N, 1, ...]``, or a dict of those by layer type.
        depths: Of the rows ``[N]``.
    """

    def __init__(self, made: Any, depths: Tensor) -> None:
        self._made, self._depths = made, depths
        self._mixed: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, layer: PagedLayer) -> tuple[Tensor, Tensor]:
        """What ``layer`` rotates its rows by."""
        kinds, ropes = layer.kinds, layer.ropes
        if len(set(kinds)) == 1 and (all(ropes) or len(ropes) == 1):
            return self._by_kind(kinds[0])
        if (kinds, ropes) not in self._mixed:
            cosines, sines = (torch.empty_like(each) for each in self._by_kind(kinds[0]))
            for depth, (kind, rotates) in enumerate(zip(kinds, ropes, strict=True)):
                here = (self._depths == depth)[:, None, None]
                cosine, sine = self._by_kind(kind)
                cosines = torch.where(here, cosine if rotates else torch.ones_like(cosine), cosines)
                sines = torch.where(here, sine if rotates else torch.zeros_like(sine), sines)
            self._mixed[kinds, ropes] = cosines, sines
        return self._mixed[kinds, ropes]

    def _by_kind(self, kind: str | None) -> tuple[Tensor, Tensor]:
        return self._made[kind] if isinstance(self._made, dict) else self._made
