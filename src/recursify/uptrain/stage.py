"""The interface of a stage of uptraining: the run that it gets, and the result that it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState

from recursify.modeling import RecursiveConfig
from recursify.progress import Progress

from .settings import UptrainSettings


@dataclass(frozen=True)
class TrainingRun:
    """One run of a stage.

    Attributes:
        source: Folder of the recursive model.
        config: Config of that model.
        output: Folder for checkpoints, metrics and the trained model.
        settings: Settings of the stage.
        state: accelerate's state of this process and the others.
        resume: True to continue the run in ``output``.
        overwrite: True to replace the contents of ``output``.
        progress: Callback for the number of tokens done.
    """

    source: Path
    config: RecursiveConfig
    output: Path
    settings: UptrainSettings
    state: PartialState
    resume: bool
    overwrite: bool
    progress: Progress

    def describe(self) -> dict[str, Any]:
        """The facts that must not change when a run is resumed; stored beside its checkpoints."""
        return {
            "model": str(self.source.absolute()),
            "num_processes": self.state.num_processes,
            **self.settings.to_dict(),
        }


@dataclass(frozen=True)
class UptrainResult:
    """Result of a finished run.

    Attributes:
        output: Folder of the trained model.
        steps: Number of optimizer steps.
        tokens: Number of training tokens, over all ranks.
        before: Held-out figures before the first step; empty where they were not measured.
        after: Held-out figures after the last step, of the float32 weights (written in the dtype of the source).
        curves: Plot of the losses; None without matplotlib.
    """

    output: Path
    steps: int
    tokens: int
    before: dict[str, float]
    after: dict[str, float]
    curves: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "output": str(self.output), "curves": None if self.curves is None else str(self.curves)}


class Stage(ABC):
    """A kind of uptraining, chosen with ``--stage NAME``.

    Subclass :class:`~recursify.uptrain.end_to_end.EndToEndStage` (or one of its subclasses) for a stage that trains the
    whole model with the Trainer, and this class for one that does its own training.

    Attributes:
        needs_teacher: True if the stage reads the dense model's layers, even if ``kl_weight`` is 0.
        supports_routing: True if the stage trains models that have routers.
        trained_parts: Parts that only such a stage trains: ``heads`` (exit heads), ``routers``.
    """

    needs_teacher: ClassVar[bool] = False
    supports_routing: ClassVar[bool] = False
    trained_parts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def check_settings(cls, settings: UptrainSettings) -> None:
        """Check settings that only this stage restricts, before anything is loaded.

        Raises:
            SettingsError: The stage does not support the settings.
        """

    @classmethod
    @abstractmethod
    def train(cls, run: TrainingRun) -> UptrainResult:
        """Train the model in ``run.source`` and write the result into ``run.output``; all processes call this."""
