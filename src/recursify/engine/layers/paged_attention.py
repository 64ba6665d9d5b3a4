"""Attention over pages, registered with transformers for the layers that the engine calls.

Rows come in the first axis, ``[N, heads, 1, head size]``: one row is one token at one depth. A layer's new keys and
values are written to the KV cache first, so that the rows of a chunk see one another.

The attention batch decides how rows write and attend: with kernels (``recursify.kernels``), or with the form for any
device below, which gathers pages and calls PyTorch's scaled dot-product attention. Query heads that share a key head
form one matrix, so keys are not repeated.

Shape legend: N rows, n rows in a group, H query heads, G of them per key head, K key heads, L keys, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from recursify.errors import UnsupportedModelError
from recursify.modeling.recursive_columns import KeysAndValuesWritten

ATTENTION_NAME = "recursify_paged"
"""Name of the registered function."""


class _Call(threading.local):
    """Attention batch and layer of the call in progress; not an argument of layers, which may not pass it on."""

    batch: Any = None
    layer: Any = None
    is_done = False

    def begin(self, layer: Any) -> None:
        """Begin a call of ``layer``, a :class:`~.decoder.PagedLayer`, which is to attend once."""
        self.layer, self.is_done = layer, False


_call = _Call()


@contextmanager
def attending(batch: Any) -> Iterator[_Call]:
    """Have the layers that this thread calls attend by ``batch``: an :class:`~.batch.AttentionBatch`, a
    :class:`~.static_batch.StaticAttentionBatch` or a probe."""
    _call.batch = batch
    _call.begin(None)
    try:
        yield _call
    finally:
        _call.batch = _call.layer = None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend with queries ``[N, H, 1, D]``, and keys and values ``[N, K, 1, D]`` to store first: ``[N, 1, H, D]``.

    The attention batch and the layer are those of :func:`attending`.

    Raises:
        KeysAndValuesWritten: The batch only writes the KV cache; this ends the layer's forward.
        UnsupportedModelError: The layer passes a tensor that this attention does not know (attention sinks), or attends
            more than once.
    """
    batch, layer = _call.batch, _call.layer
    assert batch is not None, "only the engine's model runner calls layers with this attention"
    for name, other in others.items():
        if isinstance(other, Tensor) and name != "position_ids":
            raise UnsupportedModelError(
                f"The engine cannot run this model: {type(module).__name__} passes '{name}' to its attention function, "
                f"which paged attention does not support. Use transformers' generate instead."
            )
    if _call.is_done:
        raise UnsupportedModelError(
            f"The engine cannot run this model: a {type(module).__name__} attends more than once, and pages have room "
            f"for its keys and values once. Use transformers' generate instead."
        )
    _call.is_done = True
    batch.store(layer, key.squeeze(2), value.squeeze(2))
    if batch.only_writes:
        raise KeysAndValuesWritten
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return batch.attend(layer, query.squeeze(2), scale, softcap).unsqueeze(1), None


def gather(cache: Tensor, group: Any) -> Tensor:
    """Gather a group's pages of keys or values, ``[n, K, L, D]``. On a CPU five times as fast as indexing."""
    pages = cache.index_select(0, group.pages)
    return pages.view(len(group.tables), -1, *cache.shape[2:]).transpose(1, 2)


def attend_singles(layer: Any, group: Any, query: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attend with each row ``[n, H, D]`` over its own pages: ``[n, H, D]``."""
    keys, values = gather(layer.keys, group), gather(layer.values, group)
    grouped = query.unflatten(1, (keys.shape[1], -1))  # [n, K, G, D]
    mask = group.visible(layer.windows)[:, None, None]
    return attend(grouped, keys, values, mask, scale, softcap).flatten(1, 2)


def attend_chunk(layer: Any, chunk: Any, query: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attend with rows ``[n, H, D]`` of one request at one depth over the same pages: ``[n, H, D]``."""
    keys, values = gather(layer.keys, chunk), gather(layer.values, chunk)
    count, kv_heads = len(query), keys.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, K, G n, D]
    mask = chunk.visible(layer.windows).repeat(grouped.shape[2] // count, 1)
    out = attend(grouped, keys, values, mask, scale, softcap)[0]
    return out.unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute ``softmax(cap(q kᵀ · scale) | mask) v``. PyTorch's own function has no softcap."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values


AttentionInterface.register(ATTENTION_NAME, paged_attention)
