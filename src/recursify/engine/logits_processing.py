"""Changes that requests make to the logits before a token is sampled: biases, a minimum length, and penalties.

Shape legend: n tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
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
    repetition, frequency, presence = on_device(numbers, logits.device, logits.dtype).unbind(-1)
    if any(entry.repetition_penalty != 1 for entry in params):
        rows, _ = at = _occurrences([request.tokens for request in requests], logits.device)
        values, penalty = logits[at], repetition[rows]
        logits = logits.index_put(at, torch.where(values > 0, values / penalty, values * penalty))
    if any(entry.frequency_penalty or entry.presence_penalty for entry in params):
        rows, _ = at = _occurrences([request.tokens[request.prompt_length :] for request in requests], logits.device)
        logits = logits.index_put(at, logits[at] - presence[rows])
        logits = logits.index_put(at, -frequency[rows], accumulate=True)
    return logits


def _occurrences(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and id of every token of ``sequences``, one for each row; a token that recurs is there several times."""
    tokens = list(itertools.chain.from_iterable(sequences))
    lengths = on_device([len(sequence) for sequence in sequences], device, torch.long)
    return torch.repeat_interleave(lengths, output_size=len(tokens)), on_device(tokens, device, torch.long)
