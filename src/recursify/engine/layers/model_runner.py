"""Model runner: the only part of the engine that calls the model's layers.

Shape legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recursify.modeling.recursive_columns import KeysAndValuesWritten

from .batch import AttentionBatch, TokenSpan
from .decoder import DecoderAdapter, PagedLayer
from .kv_cache import KVCache
from .mixed_depth import use_norm_kernel
from .paged_attention import attending
from .rotations import Rotations
from .static_batch import StaticAttentionBatch


class ModelRunner:
    """Model with its KV cache.

    ``kernels`` runs KV-cache writes, attention, and norms of rows at mixed depths in Triton.
    """

    def __init__(self, decoder: DecoderAdapter, kv_cache: KVCache, *, kernels: bool = False) -> None:
        self.decoder, self.kv_cache, self.kernels = decoder, kv_cache, kernels
        self.device = decoder.device
        if kernels:
            use_norm_kernel(layer.module for layer in decoder.block)

    def enter(self, ids: Tensor, spans: Sequence[TokenSpan]) -> tuple[Tensor, Tensor]:
        """Embed ``ids [N]`` and run the prelude: embeddings and input of the block, each ``[N, D]``."""
        embedded = self.decoder.embed(ids[:, None])[:, 0]
        return embedded, self.run(self.decoder.prelude, spans, embedded)

    def block(self, spans: Sequence[TokenSpan], states: Tensor) -> Tensor:
        """Run the shared block once, ``[N, D] -> [N, D]``."""
        return self.run(self.decoder.block, spans, states)

    def coda(self, spans: Sequence[TokenSpan], states: Tensor) -> Tensor:
        """Run the coda without the final norm, ``[N, D] -> [N, D]``."""
        return self.run(self.decoder.coda, spans, states)

    def run(
        self, layers: Sequence[PagedLayer], spans: Sequence[TokenSpan], states: Tensor, *, only_writes: bool = False
    ) -> Tensor:
        """Run ``layers`` on ``states [N, D]`` of ``spans`` sorted by depth.

        With ``only_writes`` each layer writes its keys and values of the same ``states``, and does nothing else.
        """
        if not layers or not len(states):
            return states
        batch = AttentionBatch(spans, self.kv_cache, kernels=self.kernels, only_writes=only_writes)
        self.decoder.depth_context.set(_rows_per_depth(spans), self.device)
        return self._run(layers, batch, states)

    def run_static(self, layers: Sequence[PagedLayer], batch: StaticAttentionBatch, states: Tensor) -> Tensor:
        """Run ``layers`` on ``states [N, D]`` with static shapes and without a sync."""
        if not layers:
            return states
        self.decoder.depth_context.set_static(batch.depths)
        return self._run(layers, batch, states)

    def _run(
        self, layers: Sequence[PagedLayer], batch: AttentionBatch | StaticAttentionBatch, states: Tensor
    ) -> Tensor:
        hidden, positions = states[:, None], batch.positions[:, None]
        rotations = Rotations(self.decoder.rotations(hidden, positions, batch.rope_lengths), batch.depths)
        with attending(batch) as call:
            for layer in layers:
                call.begin(layer)
                try:
                    hidden = layer.module(
                        hidden,
                        attention_mask=None,
                        position_embeddings=rotations.of(layer),
                        position_ids=positions,
                        use_cache=False,
                    )
                except KeysAndValuesWritten:
                    continue
        return hidden[:, 0]

    def compute_logits(self, states: Tensor) -> Tensor:
        """Logits ``[N, V]`` of the last layer's output."""
        return self.decoder.compute_logits(self.decoder.norm(states))

    def compute_exit_logits(self, depth: int, states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[N, V]`` of the exit after ``depth``."""
        return self.decoder.model.compute_exit_logits(depth, states, vocabulary)


def _rows_per_depth(spans: Sequence[TokenSpan]) -> list[tuple[int, int]]:
    """Depths of the rows in order, with the number of rows at each."""
    counts: dict[int, int] = {}
    for span in spans:
        depth = span.depth or 0
        counts[depth] = counts.get(depth, 0) + len(span.positions)
    return list(counts.items())
