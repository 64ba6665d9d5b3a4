"""``calibrate_exits``: thresholds of an exit policy for a target agreement, written into the model's folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from recursify.checkpoint.loading import load_model, require_recursive
from recursify.checkpoint.record import update_record
from recursify.errors import SettingsError, TextError
from recursify.modeling import EXIT_POLICIES, ExitPolicy, RecursiveForCausalLM, copy_travelling_files, make_policy
from recursify.pictures import DARK, SHARED, new_figure, save_figure
from recursify.progress import Progress, silent
from recursify.settings import resolve_settings

from .exit_thresholds import ThresholdOutcome, apply_thresholds, choose_thresholds, predict_at_exits
from .settings import ExitCalibrationSettings
from .text import default_text, num_context, read_text, token_windows

CURVE_TARGETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.999)
MINIMUM_TOKENS = 256
"""Minimum tokens of either half: with fewer, an agreement of 95 % is known to 3 points at best."""


@dataclass(frozen=True)
class ExitCalibration:
    """Thresholds for a target agreement, and the curve of other targets.

    Attributes:
        text: Name of the text.
        vocabulary: Number of vocabulary entries that the policy scores; None scores all.
        policy: Name of the policy.
        num_tokens: Number of tokens in either half of the text.
        chosen: Outcome on the half that the thresholds were chosen on.
        held_out: Outcome on the other half.
        curve: Held-out outcomes for other targets.
    """

    text: str
    vocabulary: int | None
    policy: str
    num_tokens: int
    chosen: ThresholdOutcome
    held_out: ThresholdOutcome
    curve: list[ThresholdOutcome]

    @property
    def thresholds(self) -> list[float]:
        """One threshold per exit."""
        return self.chosen.thresholds

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as in ``recursify.json``."""
        return asdict(self)

    def plot(self, file: str | Path) -> None:
        """Draw held-out agreement against mean depth, in the format of the suffix of ``file`` (png, svg, pdf).

        Raises:
            SettingsError: matplotlib is not installed, or does not support the format.
            OutputError: The file cannot be written.
        """
        figure = new_figure(5.5, 3.6)
        axes = figure.subplots()
        depths, agreements = zip(*((outcome.mean_depth, outcome.agreement) for outcome in self.curve), strict=True)
        axes.plot(depths, agreements, marker="o", markersize=3, color=SHARED)
        axes.plot(self.held_out.mean_depth, self.held_out.agreement, marker="s", color=DARK)
        axes.set_xlabel("mean exit depth")
        axes.set_ylabel("agreement with the full model")
        axes.set_title(f"policy {self.policy}, {self.num_tokens:,} held-out tokens", fontsize=10)
        save_figure(figure, file)


def calibrate_exits(
    model: str | Path,
    *,
    settings: ExitCalibrationSettings | None = None,
    dry_run: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
    **options: Any,
) -> ExitCalibration:
    """Choose the thresholds of an exit policy and write them into ``config.json``, where ``generate`` finds them.

    Args:
        model: Folder of a recursive model.
        settings: Settings; give these or ``options``.
        dry_run: Leave the folder unchanged.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: Device to run on, for instance ``cpu`` or ``cuda:1``.
        progress: Callback for the number of batches read.
        options: Fields of :class:`~recursify.evaluation.settings.ExitCalibrationSettings`.

    Raises:
        CheckpointError: ``model`` is not the folder of a recursive model, or does not load.
        SettingsError: The settings are invalid, or the policy has no threshold or does not fit the model.
        TextError: The text is missing, unreadable or too short.
    """
    folder = require_recursive(model)
    settings = resolve_settings(ExitCalibrationSettings, settings, options)
    text = read_text(settings.data) if settings.data else default_text("held_out")
    loaded, tokenizer = load_model(folder, dtype=dtype, device=device)
    vocab_size = loaded.config.vocab_size
    windows = token_windows(tokenizer, text, settings.length, max_tokens=settings.max_tokens, vocab_size=vocab_size)
    calibration = calibrate_on_windows(
        cast(RecursiveForCausalLM, loaded),
        windows,
        settings,
        num_context=num_context(tokenizer),
        text=text.name,
        progress=progress,
    )
    if not dry_run:
        loaded.config.exit_policy, loaded.config.exit_thresholds = settings.policy, calibration.thresholds
        loaded.config.exit_vocabulary = settings.vocabulary
        loaded.config.save_pretrained(folder)
        copy_travelling_files(loaded.config, folder)
        update_record(folder, exit_calibration=calibration.to_dict())
    return calibration


def calibrate_on_windows(
    model: RecursiveForCausalLM,
    windows: Tensor,
    settings: ExitCalibrationSettings,
    *,
    num_context: int = 1,
    text: str = "",
    progress: Progress = silent,
) -> ExitCalibration:
    """Choose thresholds on the first half of token windows ``[W, T]``, and evaluate them on the second.

    The first ``num_context`` tokens of each window are not predicted.

    Raises:
        SettingsError: The policy has no threshold or does not fit the model.
        TextError: There are too few tokens.
    """
    exit_policy = _require_policy(model, settings.policy, settings.vocabulary)
    predictions = predict_at_exits(model, windows, exit_policy, num_context=num_context, progress=progress)
    first, second = predictions.split()
    if first.agrees.shape[1] < MINIMUM_TOKENS:
        raise TextError(
            f"The text has {predictions.agrees.shape[1]} tokens to predict, and {2 * MINIMUM_TOKENS} are needed, half "
            f"of them to evaluate the thresholds on. Give more text."
        )

    def held_out(target: float) -> ThresholdOutcome:
        return apply_thresholds(second, choose_thresholds(first, target, exit_policy.lowest), target)

    result = held_out(settings.target_agreement)
    return ExitCalibration(
        text=text,
        vocabulary=settings.vocabulary,
        policy=settings.policy,
        num_tokens=first.agrees.shape[1],
        chosen=apply_thresholds(first, result.thresholds, settings.target_agreement),
        held_out=result,
        curve=[held_out(other) for other in CURVE_TARGETS],
    )


def _require_policy(model: RecursiveForCausalLM, name: str, vocabulary: int | None) -> ExitPolicy:
    names = [name for name, kind in EXIT_POLICIES.items() if not kind.simulated and name != "fixed"]
    if name not in names:
        raise SettingsError(f"Policy '{name}' has no confidence to set a threshold on. Use one of: {', '.join(names)}.")
    try:
        policy = make_policy(name, vocabulary=vocabulary)
        policy.check_vocabulary(model.config.vocab_size)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if not model.config.exit_depths:
        raise SettingsError(
            "The model runs its block once, so it has no exits to set thresholds for. Convert with two recursions."
        )
    if policy.needs_head and model.exit_heads is None:
        raise SettingsError(
            f"Policy '{name}' needs exit heads, and the model has none. Train them (recursify uptrain --stage exits), "
            f"or use --policy confidence."
        )
    return policy
