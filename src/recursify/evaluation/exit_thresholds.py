"""Thresholds of an exit policy for a target agreement with the full model.

The model predicts a text once, at all exits and after the last recursion. A target agreement is a budget of
disagreements, which the exits share: each takes the lowest threshold at which the tokens that have not exited yet use
up no more than its part. The unused rest goes to the next exit.

Shape legend: N tokens, E exits, V entries of the vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from recursify.modeling import ExitHead, ExitPolicy, RecursiveForCausalLM
from recursify.modeling.recursive_policies import ExitContext
from recursify.progress import Progress, silent

from .perplexity import LOGIT_BYTES

TOKENS_PER_BATCH = 1024
"""Tokens per forward pass."""


@dataclass(frozen=True)
class ExitPredictions:
    """Predictions of every exit for every token.

    Attributes:
        confidences: Confidence of the policy, ``[E, N]``.
        agrees: Bool ``[E, N]``: whether the exit's argmax is the full model's.
    """

    confidences: Tensor
    agrees: Tensor

    def split(self) -> tuple[ExitPredictions, ExitPredictions]:
        """Split into a first half to choose thresholds on, and a second half to evaluate them on."""
        half = self.agrees.shape[1] // 2
        return (
            ExitPredictions(self.confidences[:, :half], self.agrees[:, :half]),
            ExitPredictions(self.confidences[:, half:], self.agrees[:, half:]),
        )


@dataclass(frozen=True)
class ThresholdOutcome:
    """Effect of thresholds on a text.

    Attributes:
        target: Agreement that the thresholds were chosen for.
        thresholds: One threshold per exit.
        agreement: Fraction of tokens with the argmax of the full model.
        mean_depth: Mean depth at which tokens exit, ``E`` for tokens that run all recursions.
        exit_fractions: Fraction of tokens that exit, per exit.
    """

    target: float
    thresholds: list[float]
    agreement: float
    mean_depth: float
    exit_fractions: list[float]


@torch.inference_mode()
def predict_at_exits(
    model: RecursiveForCausalLM,
    windows: Tensor,
    policy: ExitPolicy,
    *,
    num_context: int = 1,
    progress: Progress = silent,
) -> ExitPredictions:
    """Predict the tokens of ``[W, T]`` token windows at all exits, and compare with the full model.

    The first ``num_context`` tokens of each window are not predicted.
    """
    confidences, agreements = [], []
    # All exits of a chunk have their logits in memory at the same time.
    chunk = max(1, LOGIT_BYTES // (4 * model.config.vocab_size * (1 + len(model.config.exit_depths))))
    batches = windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
    for done, batch in enumerate(batches, start=1):
        read = _read_boundaries(model, batch, num_context)
        for start in range(0, len(read.last), chunk):
            rows = slice(start, start + chunk)
            contexts = _contexts(model, read, rows, policy.vocabulary)
            full = model.compute_logits(read.last[rows]).argmax(-1)
            confidences.append(torch.stack([policy.confidence(context) for context in contexts]).float().cpu())
            agreements.append(torch.stack([context.all_logits.argmax(-1) == full for context in contexts]).cpu())
        progress("read", done, len(batches))
    return ExitPredictions(torch.cat(confidences, dim=1), torch.cat(agreements, dim=1))


@torch.inference_mode()
def exit_contexts(
    model: RecursiveForCausalLM, windows: Tensor, vocabulary: int | None = None
) -> tuple[list[ExitContext], Tensor]:
    """Run ``[w, T]`` token windows once, for all ``n = w · (T-1)`` tokens that have a next one.

    Args:
        model: Recursive model.
        windows: Token ids ``[w, T]``.
        vocabulary: Number of vocabulary entries that the policy scores; None scores all.

    Returns:
        One context per exit, and the normed states ``[n, D]`` after the last layer.
    """
    read = _read_boundaries(model, windows)
    return _contexts(model, read, slice(None), vocabulary), read.last


@dataclass(frozen=True)
class _Boundaries:
    """States ``[n, D]`` of a batch's tokens before each recursion, at each exit, and after the last layer (normed)."""

    before: list[Tensor]
    exits: list[Tensor]
    last: Tensor


def _read_boundaries(model: RecursiveForCausalLM, windows: Tensor, num_context: int = 1) -> _Boundaries:
    ids = windows.to(model.device)
    outputs = model.model(ids, use_cache=False, exit_depths=model.config.exit_depths)

    def flat(state: Tensor) -> Tensor:
        return state[:, num_context - 1 : -1].flatten(0, 1)

    before = [model.get_input_embeddings()(ids), *(outputs.boundary_states or ())]
    exits = outputs.exit_states or ()
    return _Boundaries([*map(flat, before)], [*map(flat, exits)], flat(outputs.last_hidden_state))


def _contexts(model: RecursiveForCausalLM, read: _Boundaries, rows: slice, vocabulary: int | None) -> list[ExitContext]:
    """One context per exit, for some of the tokens."""
    depths = model.config.exit_depths
    states, exit_states = [state[rows] for state in read.before], [state[rows] for state in read.exits]
    # Over the whole vocabulary: whether an exit agrees depends on it.
    logits = [model.compute_exit_logits(depth, state) for depth, state in zip(depths, exit_states, strict=True)]

    def context(depth: int) -> ExitContext:
        head = None if model.exit_heads is None else cast(ExitHead, model.exit_heads[depth])
        state = states[depth + 1]
        return ExitContext(
            depth,
            state,
            states[depth],
            arrive=lambda: exit_states[depth],
            read=lambda _, entries: logits[depth][:, :entries],
            previous_logits=logits[depth - 1][:, :vocabulary] if depth else None,
            test=None if head is None else lambda: head.agreement(state),
            vocabulary=vocabulary,
        )

    return [context(depth) for depth in depths]


def choose_thresholds(predictions: ExitPredictions, target: float, lowest: float) -> list[float]:
    """Choose the lowest thresholds, exit by exit, that keep the agreement of all tokens at ``target``.

    Args:
        predictions: Predictions to choose by.
        target: Fraction of tokens with the argmax of the full model.
        lowest: Threshold below every confidence of the policy.
    """
    num_exits, num_tokens = predictions.agrees.shape
    budget = (1 - target) * num_tokens
    is_running = torch.ones(num_tokens, dtype=torch.bool)
    thresholds: list[float] = []
    for confidence, agrees in zip(predictions.confidences, predictions.agrees, strict=True):
        allowed = budget / (num_exits - len(thresholds))
        thresholds.append(_lowest_threshold(confidence[is_running], agrees[is_running], allowed, lowest))
        exits = is_running & (confidence > thresholds[-1])
        budget -= int((exits & ~agrees).sum())
        is_running &= ~exits
    return thresholds


def _lowest_threshold(confidence: Tensor, agrees: Tensor, allowed: float, lowest: float) -> float:
    """The lowest threshold with at most ``allowed`` disagreements among the tokens above it; ties exit together."""
    order = confidence.argsort(descending=True)
    confidence, num_wrong = confidence[order], (~agrees[order]).cumsum(0)
    num_exits = int((num_wrong <= allowed).sum())
    # The threshold is the confidence of the first token that must not exit; its ties do not exit, either.
    return lowest if num_exits == len(confidence) else float(confidence[num_exits])


def apply_thresholds(predictions: ExitPredictions, thresholds: list[float], target: float) -> ThresholdOutcome:
    """Count the effect of ``thresholds`` on the tokens of ``predictions``."""
    num_exits, num_tokens = predictions.agrees.shape
    is_running = torch.ones(num_tokens, dtype=torch.bool)
    num_agreeing, depth_sum, exit_fractions = 0, 0, []
    for depth, threshold in enumerate(thresholds):
        exits = is_running & (predictions.confidences[depth] > threshold)
        num_agreeing += int((exits & predictions.agrees[depth]).sum())
        exit_fractions.append(float(exits.float().mean()))
        depth_sum += depth * int(exits.sum())
        is_running &= ~exits
    rest = int(is_running.sum())
    return ThresholdOutcome(
        target,
        thresholds,
        agreement=(num_agreeing + rest) / num_tokens,
        mean_depth=(depth_sum + num_exits * rest) / num_tokens,
        exit_fractions=exit_fractions,
    )
