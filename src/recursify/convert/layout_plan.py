"""Layouts for a budget: one measuring pass over the dense model, the table of the best, and the one to convert to."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, load_tokenizer
from recursify.errors import PlanError
from recursify.evaluation.text import Text, token_windows
from recursify.pictures import DARK, SHARED, new_figure, save_figure
from recursify.progress import Progress

from .layout_measurement import measure_dense
from .layout_search import LayoutChoice, LayoutSearch
from .plan import make_plan
from .settings import ConversionSettings
from .sharing_errors import SharingErrors

MEASURED_TOKENS = 2048
"""Largest number of calibration tokens of the measuring pass."""


@dataclass(frozen=True)
class LayoutPlan:
    """Layouts of one dense model by size.

    Attributes:
        source: Dense model as the user named it.
        num_parameters: Stored parameters of the dense model.
        perplexity: Perplexity of the dense model on the tokens that were measured.
        num_tokens: Number of these tokens.
        text: Name of their text.
        front: Layouts of least predicted perplexity at their size, from large to small.
        default: Layout and rank that the settings without a budget give; None if the layers do not fold so.
        same_size: Best layout of at most the size of ``default``; None if no layout is as small.
        chosen: Layout for the budget; None without one.
    """

    source: str
    num_parameters: int
    perplexity: float
    num_tokens: int
    text: str
    front: list[LayoutChoice]
    default: LayoutChoice | None
    same_size: LayoutChoice | None
    chosen: LayoutChoice | None

    @property
    def default_wins(self) -> bool:
        """True if no layout is predicted to beat the default at its size."""
        if self.default is None:
            return False
        return self.same_size is None or self.same_size.perplexity >= self.default.perplexity

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, as ``recursify plan --json`` prints it."""
        choices = {name: getattr(self, name) for name in ("default", "same_size", "chosen")}
        return {
            **{name: getattr(self, name) for name in ("source", "num_parameters", "perplexity", "num_tokens", "text")},
            "front": [choice.to_dict() for choice in self.front],
            **{name: choice and choice.to_dict() for name, choice in choices.items()},
            "default_wins": self.default_wins,
        }

    def plot(self, file: str | Path) -> None:
        """Draw predicted perplexity over size, in the format of the file name.

        Raises:
            SettingsError: matplotlib is not installed, or the format is not supported.
            OutputError: The file cannot be written.
        """
        figure = new_figure(6, 4)
        axes = figure.add_subplot()
        sizes, perplexities = [c.size for c in self.front], [c.perplexity for c in self.front]
        axes.plot(sizes, perplexities, "o-", color=SHARED, label="best layout and ranks")
        if self.default is not None:
            label = f"default, {self.default.layout}"
            axes.plot(self.default.size, self.default.perplexity, "s", color=DARK, label=label)
        if self.chosen is not None:
            label = f"chosen, {self.chosen.layout}"
            axes.plot(self.chosen.size, self.chosen.perplexity, "D", color=DARK, fillstyle="none", label=label)
        axes.axhline(self.perplexity, color=DARK, linewidth=0.8, linestyle=":", label="dense")
        axes.set_xlabel("stored parameters, relative to the dense model")
        axes.set_ylabel("predicted perplexity")
        axes.set_yscale("log")
        axes.legend()
        save_figure(figure, file)


def search_layouts(
    checkpoint: DenseCheckpoint, settings: ConversionSettings, text: Text, progress: Progress
) -> LayoutSearch:
    """Measure the dense model on ``text`` and score all its layouts.

    Raises:
        TextError: The text is too short.
        CheckpointError: The model has no tokenizer.
    """
    # One recursion folds whatever the number of layers.
    plan = make_plan(checkpoint, replace(_without_budget(settings), num_recursions=1), has_text=True)
    length = min(settings.calibration_length, plan.config.max_position_embeddings)
    max_tokens = min(MEASURED_TOKENS, settings.calibration_tokens)
    tokenizer = load_tokenizer(checkpoint)
    windows = token_windows(
        tokenizer, text, length, max_tokens=max_tokens, min_windows=2, vocab_size=plan.config.vocab_size
    )
    measurement = measure_dense(checkpoint, plan.config, windows, device=settings.device, progress=progress)
    errors = SharingErrors(checkpoint, plan.names.stem, measurement)
    return LayoutSearch(errors, plan.dense.num_parameters, progress)


def fill_budget(
    checkpoint: DenseCheckpoint, settings: ConversionSettings, text: Text, progress: Progress
) -> ConversionSettings:
    """Settings with the layout and ranks that were chosen for their budget.

    Raises:
        PlanError: No layout meets the budget; the message names the nearest.
    """
    search = search_layouts(checkpoint, settings, text, progress)
    choice = search.choose(_budget(settings, search.num_parameters))
    return replace(_without_budget(settings), **choice.settings())


def make_layout_plan(
    checkpoint: DenseCheckpoint, settings: ConversionSettings, text: Text, progress: Progress
) -> LayoutPlan:
    """Table of the best layouts by size, and the one for the budget of the settings, if they have one.

    Raises:
        PlanError: No layout meets the budget; the message names the nearest.
    """
    search = search_layouts(checkpoint, settings, text, progress)
    default, same_size = _default(checkpoint, search), None
    if default is not None:
        with suppress(PlanError):
            same_size = search.choose(default.num_parameters)
    return LayoutPlan(
        source=checkpoint.source,
        num_parameters=search.num_parameters,
        perplexity=search.errors.measurement.perplexity,
        num_tokens=search.errors.measurement.num_tokens,
        text=text.name,
        front=search.front(),
        default=default,
        same_size=same_size,
        chosen=search.choose(_budget(settings, search.num_parameters)) if settings.has_budget else None,
    )


def _default(checkpoint: DenseCheckpoint, search: LayoutSearch) -> LayoutChoice | None:
    defaults = ConversionSettings()
    try:
        layout = make_plan(checkpoint, defaults, has_text=True).layout
    except PlanError:
        return None
    return search.score(layout, defaults.lora_rank)


def _without_budget(settings: ConversionSettings) -> ConversionSettings:
    return replace(settings, target_size=None, target_parameters=None)


def _budget(settings: ConversionSettings, dense_parameters: int) -> int:
    if settings.target_parameters is not None:
        return settings.target_parameters
    assert settings.target_size is not None
    return int(settings.target_size * dense_parameters)
