"""Exit thresholds learned in use, by comparing exits with the whole model on the same tokens.

With exact keys and values every token that exited runs all layers in the end, which shows whether the exit was right.
Confidences of tokens where exit and whole model agree are modelled by one Beta distribution, those of the others by
another (FREE, arXiv 2310.05424, section 3.3); the threshold separates them.

Two estimators of it: FREE's as released, which compares densities as if both classes were equally frequent, and can end
at 0.3 or 0.9 whatever the text; and a guarded one, which aims at an agreement and needs samples of both classes.

``ExitSettings(adapt=AdaptiveThresholds(0.95))`` uses them.

Shape legend: n samples of one exit.
"""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 1e-4
"""Distance of confidences from 0 and 1, where densities are infinite."""

FREE_GRID = (0.3, 0.9, 10)
FREE_TARGET = 0.4
FREE_SEQUENCES = 300
FREE_OTHER_CLASS = 5e-4
"""FREE's released settings. Its responsibilities never reach 0, so each class counts the other's samples a little."""

GUARDED_TARGET = 0.95


def fit_beta(confidence: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``α`` and ``β`` of a Beta distribution with the weighted mean and variance of ``confidence [n]``.

    ``α = m (m (1 − m) / s² − 1)`` and ``β = α (1 − m) / m``.
    """
    weights = weights / weights.sum()
    mean = (weights * confidence).sum()
    # Equal samples would have a density of one point.
    variance = (weights * (confidence - mean) ** 2).sum().clamp(min=1e-8)
    alpha = mean * (mean * (1 - mean) / variance - 1)
    return alpha, alpha * (1 - mean) / mean


def beta_density(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Density at ``x``, in (0, 1)."""
    scale = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    return torch.exp(scale + (alpha - 1) * x.log() + (beta - 1) * (-x).log1p())


def free_threshold(confidence: Tensor, agrees: Tensor, target: float = FREE_TARGET) -> float:
    """Estimate as FREE's released code: where, on a grid, the agreeing class has over ``target`` of both densities.

    ``confidence`` and ``agrees`` (bool) are ``[n]``; without samples, the released starting values are used.
    """
    x = confidence.double().clamp(EDGE, 1 - EDGE)
    if len(x):
        fits = [fit_beta(x, torch.where(agrees == kind, 1.0, FREE_OTHER_CLASS)) for kind in (False, True)]
    else:
        fits = [(x.new_tensor(1.0), x.new_tensor(2.0)), (x.new_tensor(2.0), x.new_tensor(1.0))]
    # The class with the larger mean is taken for the agreeing one.
    lower, upper = sorted(fits, key=lambda fit: float(fit[0] / (fit[0] + fit[1])))
    grid = torch.linspace(*FREE_GRID, dtype=torch.float64)
    share = beta_density(grid, *upper) / (beta_density(grid, *upper) + beta_density(grid, *lower))
    above = int((share > target).sum())
    return float(grid[min(max(0, len(grid) - above), len(grid) - 1)])


def guarded_threshold(confidence: Tensor, agrees: Tensor, target: float = GUARDED_TARGET) -> float:
    """Lowest threshold above which a fraction ``target`` of tokens agrees, by two Betas and the class frequencies.

    ``P(agree | c > λ) = π₊ S₊(λ) / (π₊ S₊(λ) + π₋ S₋(λ))``, with ``S`` the mass above. Without such a threshold it is
    1, above which no token exits. ``confidence`` and ``agrees`` (bool) are ``[n]``, of both classes.
    """
    x = confidence.double().clamp(EDGE, 1 - EDGE)
    prior = agrees.double().mean()
    # Cells of equal width in log-odds: fine where thresholds near 1 matter, and mass near 0 and 1 stays finite.
    log_odds = torch.linspace(-9.2, 9.2, 4001, dtype=torch.float64)
    grid = log_odds.sigmoid()
    masses = []
    for weight, kind in ((1 - prior, False), (prior, True)):
        mass = beta_density(grid, *fit_beta(x, (agrees == kind).double())) * grid * (1 - grid)
        masses.append(weight * mass.flip(0).cumsum(0).flip(0) / mass.sum())
    wrong, right = masses
    within = (right >= target * (right + wrong)).nonzero()
    return float(grid[within[0, 0]]) if len(within) else 1.0


class AdaptiveThresholds:
    """One threshold per exit, refitted when a generation begins; share one object between calls.

    Args:
        target: Agreement of the tokens that exit with the whole model; in ``compatible`` mode FREE's share ``ζ``.
        initial: Threshold before the first fit.
        minimum: Number of samples of each class that the guarded estimator needs; with fewer, ``initial`` is used.
        window: Number of newest samples of an exit to fit to.
        compatible: Flag for FREE's estimator as released: all samples, no minimum, ``target`` 0.4, nothing learned
            after 300 sequences.
        num_sequences: Number of sequences to learn from; None never stops.

    Raises:
        ValueError: A target outside (0, 1), or too few samples.
    """

    def __init__(
        self,
        target: float | None = None,
        *,
        initial: float = 0.9,
        minimum: int = 32,
        window: int = 4096,
        compatible: bool = False,
        num_sequences: int | None = None,
    ) -> None:
        self.target = target if target is not None else FREE_TARGET if compatible else GUARDED_TARGET
        if not 0 < self.target < 1:
            raise ValueError(f"The target must be above 0 and below 1, got {self.target:g}.")
        if minimum < 2 or window < 2 * minimum:
            raise ValueError(
                f"An estimate needs 2 samples of each class at least, and a window for them: got minimum={minimum} and "
                f"window={window}."
            )
        self.initial, self.minimum, self.window, self.compatible = initial, minimum, window, compatible
        self.num_sequences = FREE_SEQUENCES if compatible and num_sequences is None else num_sequences
        self.seen = 0
        self._fitted: dict[int, float] = {}
        self._samples: dict[int, tuple[Tensor, Tensor]] = {}
        self._new: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def threshold(self, depth: int) -> float:
        """Threshold of the exit after ``depth``."""
        return self._fitted.get(depth, self.initial)

    def samples(self, depth: int) -> tuple[Tensor, Tensor]:
        """Confidences ``[n]`` and agreement ``[n]`` that the threshold of an exit was fitted to."""
        return self._samples.get(depth, (torch.empty(0), torch.empty(0, dtype=torch.bool)))

    @property
    def learning(self) -> bool:
        """Flag for thresholds that still learn."""
        return self.num_sequences is None or self.seen <= self.num_sequences

    def learn(self, depth: int, confidence: Tensor, agrees: Tensor, counted: Tensor) -> None:
        """Record tokens that ran all layers: their confidence at the exit, and agreement with the whole model.

        The tensors, of one shape, stay on their device until the next fit; ``counted`` marks entries that are tokens.
        """
        self._new.append((depth, confidence, agrees, counted))

    def begin(self, num_sequences: int) -> None:
        """Fit the thresholds, at the beginning of ``num_sequences`` sequences."""
        if not self.learning:
            return
        for depth, *recorded in self._new:
            confidence, agrees, counted = (values.flatten().cpu() for values in recorded)
            known, known_agrees = self.samples(depth)
            confidence, agrees = confidence[counted].float(), agrees[counted]
            self._samples[depth] = torch.cat([known, confidence]), torch.cat([known_agrees, agrees])
        self._new.clear()
        for depth, (confidence, agrees) in self._samples.items():
            if self.compatible:
                self._fitted[depth] = free_threshold(confidence, agrees, self.target)
                continue
            self._samples[depth] = confidence, agrees = confidence[-self.window :], agrees[-self.window :]
            self._fitted[depth] = self.initial
            if min(int(agrees.sum()), int((~agrees).sum())) >= self.minimum:
                self._fitted[depth] = guarded_threshold(confidence, agrees, self.target)
        self.seen += num_sequences
