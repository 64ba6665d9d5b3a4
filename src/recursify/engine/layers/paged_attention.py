"""The attention function that transformers' layers call in the engine: over pages, with a place per row.

Rows come in the first axis, ``[N, heads, 1, head size]``: one row is one token at one depth. The keys and values that a
layer has just made are written to the rows' slots first, so that the rows of a chunk see one another.

How rows write and attend, they know: by kernels (``kernels/``) where those run, else by the form for any device, which
is here. Pages are gathered, and PyTorch's scaled dot-product attention runs over them. Query heads that share a key
head are one matrix, so keys are never repeated.

Shape legend: N rows, n rows in a group, H query heads, G of them per key head, K key heads, L keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "recursify_paged"
"""What the function is registered as."""


class KeysAndValuesWritten(Exception):
    """Ends a layer's forward once its keys and values are in their pages, when nothing else of it is wanted."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    paged: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``[N, H, 1, D]`` and keys and values ``[N, K, 1, D]`` to ``[N, 1, H, D]``.

    ``paged`` is what the runner hands every layer: the rows of the call (:class:`~.rows.AttentionBatch`,
    :class:`~.fixed_rows.StaticAttentionBatch`) and its :class:`~.decoder_parts.Layer`.
    """
    assert paged is not None, "only the engine's runner calls layers with this attention"
    rows, layer = paged
    rows.store(layer, key.squeeze(2), value.squeeze(2))
    if rows.only_writes:
        raise KeysAndValuesWritten
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return rows.attend(layer, query.squeeze(2), scale, softcap).unsqueeze(1), None


def gather(held: Tensor, group: Any) -> Tensor:
    """Keys or values in a group's pages, ``[n, K, L, D]``; on a CPU five times as fast as indexing."""
    taken = held.index_select(0, group.pages)
    return taken.view(len(group.tables), -1, *held.shape[2:]).transpose(1, 2)


def attend_singles(layer: Any, group: Any, query: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Each row ``[n, H, D]`` over pages of its own: ``[n, H, D]``."""
    keys, values = gather(layer.keys, group), gather(layer.values, group)
    grouped = query.unflatten(1, (keys.shape[1], -1))  # [n, K, G, D]
    mask = group.visible(layer.windows)[:, None, None]
    return attend(grouped, keys, values, mask, scale, softcap).flatten(1, 2)


def attend_chunk(layer: Any, chunk: Any, query: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Rows ``[n, H, D]`` of one request at one depth, over the same pages."""
    keys, values = gather(layer.keys, chunk), gather(layer.values, chunk)
    count, kv_heads = len(query), keys.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, K, G n, D]
    mask = chunk.visible(layer.windows).repeat(grouped.shape[2] // count, 1)
    out = attend(grouped, keys, values, mask, scale, softcap)[0]
    return out.unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softmax(cap(q kᵀ · scale) | mask) v``; PyTorch's own form has no soft-capping."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values


AttentionInterface.register(ATTENTION_NAME, paged_attention)
