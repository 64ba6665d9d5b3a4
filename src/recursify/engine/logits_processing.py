"""Changes that requests make to the logits before a token is sampled: biases, a minimum length, and penalties.

Shape legend: n tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recursify.modeling.recursive_columns import on_device

from .request import Request


def process_logits(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Apply the changes of every row's request to ``logits [n, V]``; the result is float32 if there are any.

    The order is vLLM's: biases and minimum length, repetition penalty, frequency and presence penalties.
    """
    rows = [row for row, request in enumerate(requests) if request.changes_logits]
    if not rows:
        return logits
    index = on_device(rows, logits.device, torch.long)
    changing = [requests[row] for row in rows]
    changed = _add_biases(logits[index].float(), changing)
    return logits.float().index_copy(0, index, _penalize(changed, changing))


def _add_biases(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Add ``logit_bias``, and rule out tokens that would end a request before ``min_tokens``."""
    entries = [(row, *bias) for row, request in enumerate(requests) for bias in request.biases]
    if not entries:
        return logits
    rows, tokens, biases = zip(*entries, strict=True)
    index = on_device([rows, tokens], logits.device, torch.long)
    return logits.index_put((index[0], index[1]), on_device(biases, logits.device, logits.dtype), accumulate=True)


def _penalize(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Penalize tokens that have occurred: with ``repetition_penalty`` also those of the prompt."""
    params = [request.params for request in requests]
    numbers = [(entry.repetition_penalty, entry.frequency_penalty, entry.presence_penalty) for entry in params]
    columns = on_device(numbers, logits.device, logits.dtype)
    repetition, frequency, presence = columns[:, :, None].unbind(1)
    if any(entry.repetition_penalty != 1 for entry in params):
        occurred = _count([request.tokens for request in requests], logits) > 0
        logits = torch.where(occurred, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    if any(entry.frequency_penalty or entry.presence_penalty for entry in params):
        counts = _count([request.tokens[request.prompt_length :] for request in requests], logits)
        logits = logits - frequency * counts - presence * (counts > 0)
    return logits


def _count(sequences: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Count every token in each of ``sequences``, as a tensor like ``logits [n, V]``."""
    entries = [(row, token) for row, tokens in enumerate(sequences) for token in tokens]
    index = on_device(entries, logits.device, torch.long).reshape(-1, 2)
    ones = logits.new_ones(len(entries))
    return torch.zeros_like(logits).index_put((index[:, 0], index[:, 1]), ones, accumulate=True)
