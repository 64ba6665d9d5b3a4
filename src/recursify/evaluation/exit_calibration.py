"""Thresholds of an exit policy for an agreement that its user names, from text.

The model reads the text once, at all its exits. Every token then has, per exit, a confidence and whether the exit puts
the same token first as the last recursion. A target leaves a budget of disagreements, which the exits share: each takes
the lowest threshold whose tokens, of those that have not left yet, use up no more than its part. What an exit does not
use goes to the next.

Shape legend: N tokens, E exits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from recursify.errors import SettingsError, TextError
from recursify.modeling import EXIT_POLICIES, ExitHead, ExitPolicy, RecursiveForCausalLM, make_policy
from recursify.modeling.recursive_policies import ExitContext

from .pictures import DARK, SHARED, new_figure, save_figure

TOKENS_PER_BATCH = 1024
CURVE_TARGETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.999)
MINIMUM_TOKENS = 256
"""Of either half: with fewer, an agreement of 95 % is known to three points at best."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReadTokens:
    """What every exit makes of every token.

    Attributes:
        confidences: ``[E, N]``.
        agrees: ``[E, N]`` bool: whether the exit's first choice is the last recursion's.
    """

    confidences: Tensor
    agrees: Tensor

    def split(self) -> tuple[ReadTokens, ReadTokens]:
        """The first half, to choose thresholds by, and the second, to see what they do."""
        half = self.agrees.shape[1] // 2
        return (
            ReadTokens(self.confidences[:, :half], self.agrees[:, :half]),
            ReadTokens(self.confidences[:, half:], self.agrees[:, half:]),
        )


@dataclass(frozen=True)
class Outcome:
    """What thresholds do to a text.

    Attributes:
        target: The agreement that they were chosen for.
        thresholds: One per exit.
        agreement: Part of tokens whose first choice is the last recursion's.
        mean_depth: Mean of the depths after which tokens leave, those that leave last counting ``E``.
        leaving: Part of tokens that leave by each exit.
    """

    target: float
    thresholds: list[float]
    agreement: float
    mean_depth: float
    leaving: list[float]


@dataclass(frozen=True)
class ExitCalibration:
    """Thresholds for a target, and the curve around them.

    Attributes:
        policy: Its name.
        num_tokens: Tokens that thresholds were chosen by, and as many that they were tried on.
        chosen: On the text that they were chosen by.
        held_out: On the other half.
        curve: Held-out outcomes for other targets.
    """

    policy: str
    num_tokens: int
    chosen: Outcome
    held_out: Outcome
    curve: list[Outcome]

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it and ``recursify.json`` has it."""
        return asdict(self)


def calibrate_exits(
    model: RecursiveForCausalLM,
    windows: Tensor,
    policy: str,
    target: float,
    *,
    vocabulary: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ExitCalibration:
    """Choose thresholds of ``policy`` on the first half of token windows ``[W, T]``, and try them on the second.

    With ``vocabulary``, confidences are those that the policy has by so many entries of it.

    Raises:
        SettingsError: A target that is no part, or a policy that has no threshold to choose or does not fit the model.
        TextError: Too few tokens.
    """
    if not 0 < target < 1:
        raise SettingsError(f"The target agreement must be above 0 and below 1, got {target:g}.")
    chosen_policy = _require_policy(model, policy, vocabulary)
    read = read_exits(model, windows, chosen_policy, progress=progress)
    first, second = read.split()
    if first.agrees.shape[1] < MINIMUM_TOKENS:
        raise TextError(
            f"The text has {read.agrees.shape[1]} tokens to predict, and {2 * MINIMUM_TOKENS} are needed, half of them "
            f"to try the thresholds on. Give more."
        )
    lowest = chosen_policy.lowest
    thresholds = choose_thresholds(first, target, lowest)
    return ExitCalibration(
        policy=policy,
        num_tokens=first.agrees.shape[1],
        chosen=apply_thresholds(first, thresholds, target),
        held_out=apply_thresholds(second, thresholds, target),
        curve=[apply_thresholds(second, choose_thresholds(first, each, lowest), each) for each in CURVE_TARGETS],
    )


def _require_policy(model: RecursiveForCausalLM, name: str, vocabulary: int | None) -> ExitPolicy:
    able = [name for name, kind in EXIT_POLICIES.items() if not kind.simulated and name != "fixed"]
    if name not in able:
        raise SettingsError(f"Policy '{name}' has no confidence to set a threshold on. Use one of: {', '.join(able)}.")
    try:
        policy = make_policy(name, vocabulary=vocabulary)
        policy.check_vocabulary(model.config.vocab_size)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if not model.config.exit_depths:
        raise SettingsError("The model has no boundary between recursions, so it has no exits to set thresholds for.")
    if policy.needs_head and model.exit_heads is None:
        raise SettingsError(
            f"Policy '{name}' needs exit heads, and the model has none. Train them (recursify uptrain --stage exits), "
            f"or use --policy confidence."
        )
    return policy


@torch.inference_mode()
def read_exits(
    model: RecursiveForCausalLM,
    windows: Tensor,
    policy: ExitPolicy,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> ReadTokens:
    """Confidence and agreement of all exits on all tokens of ``[W, T]`` windows that another follows."""
    confidences, agreements = [], []
    batches = windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
    for done, batch in enumerate(batches):
        boundaries, last_states = read_boundaries(model, batch, policy.vocabulary)
        last = model.compute_logits(last_states).argmax(-1)
        confidences.append(torch.stack([policy.confidence(each) for each in boundaries]).float().cpu())
        agreements.append(torch.stack([each.all_logits.argmax(-1) == last for each in boundaries]).cpu())
        progress("read", done + 1, len(batches))
    return ReadTokens(torch.cat(confidences, dim=1), torch.cat(agreements, dim=1))


@torch.inference_mode()
def read_boundaries(
    model: RecursiveForCausalLM, windows: Tensor, vocabulary: int | None = None
) -> tuple[list[ExitContext], Tensor]:
    """All tokens of ``[w, T]`` windows that another follows, ``n`` in number: at every exit, and after the last layer.

    Returns:
        A boundary per exit, for policies that judge by so many entries of the ``vocabulary``, and the normed states
        ``[n, D]`` that the whole model reads out.
    """
    ids = windows.to(model.device)
    depths = model.config.exit_depths
    outputs = model.model(ids, use_cache=False, exit_depths=depths)
    states = [model.get_input_embeddings()(ids), *(outputs.boundary_states or ())]
    states = [state[:, :-1].flatten(0, 1) for state in states]
    arrived = [state[:, :-1].flatten(0, 1) for state in outputs.exit_states or ()]
    # Of all entries: whether an exit agrees depends on them.
    logits = [model.compute_exit_logits(depth, state) for depth, state in zip(depths, arrived, strict=True)]
    last_states = outputs.last_hidden_state[:, :-1].flatten(0, 1)
    return [_boundary(model, depth, states, arrived[depth], logits, vocabulary) for depth in depths], last_states


def _boundary(
    model: RecursiveForCausalLM,
    depth: int,
    states: list[Tensor],
    exit_states: Tensor,
    logits: list[Tensor],
    vocabulary: int | None,
) -> ExitContext:
    """All tokens at the exit after ``depth``.

    Args:
        model: That has the exit.
        depth: Of the exit.
        states: ``[n, D]`` from the embeddings on.
        exit_states: ``[n, D]``, what the exit reads out.
        logits: ``[n, V]`` by exit.
        vocabulary: How many entries a policy looks at.
    """
    head = None if model.exit_heads is None else cast(ExitHead, model.exit_heads[depth])
    here = states[depth + 1]
    return ExitContext(
        depth,
        here,
        states[depth],
        arrive=lambda: exit_states,
        read=lambda _, entries: logits[depth][:, :entries],
        previous_logits=logits[depth - 1][:, :vocabulary] if depth else None,
        test=None if head is None else lambda: head.agreement(here),
        vocabulary=vocabulary,
    )


def choose_thresholds(read: ReadTokens, target: float, lowest: float) -> list[float]:
    """The lowest thresholds, exit by exit, that keep the agreement of all tokens at ``target``; see the module.

    Args:
        read: The text.
        target: Part of tokens that shall say what the last recursion says.
        lowest: Threshold below every confidence.
    """
    num_exits, num_tokens = read.agrees.shape
    budget = (1 - target) * num_tokens
    here = torch.ones(num_tokens, dtype=torch.bool)
    thresholds = []
    for depth in range(num_exits):
        allowed = budget / (num_exits - depth)
        confidence, agrees = read.confidences[depth][here], read.agrees[depth][here]
        thresholds.append(_lowest_threshold(confidence, agrees, allowed, lowest))
        leaves = here & (read.confidences[depth] > thresholds[-1])
        budget -= int((leaves & ~read.agrees[depth]).sum())
        here &= ~leaves
    return thresholds


def _lowest_threshold(confidence: Tensor, agrees: Tensor, allowed: float, lowest: float) -> float:
    """Below which more than ``allowed`` of the tokens above it would disagree; ties leave together."""
    order = confidence.argsort(descending=True)
    confidence, wrong = confidence[order], (~agrees[order]).cumsum(0)
    within = int((wrong <= allowed).sum())
    if within == len(confidence):
        return lowest
    # The first token that may not leave; whatever is as sure as it stays, too.
    return float(confidence[within])


def apply_thresholds(read: ReadTokens, thresholds: list[float], target: float) -> Outcome:
    """What ``thresholds`` do to the tokens of ``read``."""
    num_exits, num_tokens = read.agrees.shape
    here = torch.ones(num_tokens, dtype=torch.bool)
    right, leaving, depths = 0, [], 0
    for depth, threshold in enumerate(thresholds):
        leaves = here & (read.confidences[depth] > threshold)
        right += int((leaves & read.agrees[depth]).sum())
        leaving.append(float(leaves.float().mean()))
        depths += depth * int(leaves.sum())
        here &= ~leaves
    rest = int(here.sum())
    return Outcome(target, thresholds, (right + rest) / num_tokens, (depths + num_exits * rest) / num_tokens, leaving)


def draw_curve(calibration: ExitCalibration, file: Path) -> None:
    """Draw held-out agreement against mean depth, as the picture that the name of ``file`` asks for.

    Raises:
        SettingsError: matplotlib is not installed, or draws no such files.
        OutputError: The file cannot be written.
    """
    figure = new_figure(5.5, 3.6)
    axes = figure.subplots()
    axes.plot(
        [each.mean_depth for each in calibration.curve],
        [each.agreement for each in calibration.curve],
        marker="o",
        markersize=3,
        color=SHARED,
    )
    axes.plot(calibration.held_out.mean_depth, calibration.held_out.agreement, marker="s", color=DARK)
    axes.set_xlabel("mean depth at which tokens leave")
    axes.set_ylabel("agreement with the last recursion")
    axes.set_title(f"policy {calibration.policy}, {calibration.num_tokens:,} held-out tokens", fontsize=10)
    save_figure(figure, file)
