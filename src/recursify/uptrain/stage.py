"""The interfaces of a stage of uptraining: the run that it gets, its result, and its loss for the Trainer."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, open_checkpoint
from recursify.checkpoint.generation_defaults import FILE as GENERATION_FILE
from recursify.checkpoint.record import read_record, write_model_files
from recursify.checkpoint.writer import check_target
from recursify.errors import CheckpointError, OutputError, RecursifyError
from recursify.evaluation.fingerprint import Fingerprint
from recursify.modeling import RecursiveConfig, RecursiveForCausalLM, RecursiveOutput
from recursify.progress import Progress

from . import checkpoints
from .losses import Sums
from .settings import UptrainSettings


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


@dataclass(frozen=True)
class TrainingRun:
    """One run of a stage: its model, tokenizer and teacher, and its output folder.

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

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.output / checkpoints.FOLDER

    @property
    def scratch(self) -> Path:
        """Folder for the files of the finished model until :meth:`publish` moves them into ``output``."""
        return self.output / ".model"

    # --- Model, tokenizer and teacher ----------------------------------------------------------------------------

    def load_model(self) -> RecursiveForCausalLM:
        """Load the model to train, in float32 and with every recursion; a CheckpointError if it does not load."""
        with _refused(f"'{self.source}'"):
            return RecursiveForCausalLM.from_pretrained(self.source, dtype=torch.float32, exit_depth=None)

    def load_tokenizer(self) -> Any:
        """Load the model's tokenizer; a CheckpointError if it does not load."""
        with _refused(f"The tokenizer in '{self.source}'"):
            return AutoTokenizer.from_pretrained(self.source)

    def load_teacher(self, *, needed: bool) -> PreTrainedModel | None:
        """Load the dense teacher, frozen and in eval mode; None if ``kl_weight`` is 0 and it is not ``needed``."""
        settings = self.settings
        if not settings.kl_weight and not needed:
            return None
        dtype = None if settings.teacher_dtype == "auto" else getattr(torch, settings.teacher_dtype)
        teacher = self.open_teacher(needed=needed).load_model(dtype)
        return teacher.to(settings.teacher_device or self.state.device).requires_grad_(False)

    def open_teacher(self, *, needed: bool) -> DenseCheckpoint:
        """Open the checkpoint of the dense teacher; the error names ``kl_weight 0`` as a remedy unless ``needed``.

        Raises:
            CheckpointError: It is missing, or has another vocabulary.
        """
        alternative = "" if needed else ", or --kl-weight 0 to learn from the data alone"
        name = self.settings.teacher or read_record(self.source).get("plan", {}).get("source")
        if name is None:
            raise CheckpointError(
                f"'{self.source}' does not name the dense model it was made from. Give --teacher{alternative}."
            )
        try:
            teacher = open_checkpoint(name)
        except RecursifyError as error:
            raise CheckpointError(f"The teacher does not open: {error} Give another --teacher{alternative}.") from error
        if teacher.config.vocab_size != self.config.vocab_size:
            raise CheckpointError(
                f"The vocabulary of the teacher '{name}' has {teacher.config.vocab_size} tokens, that of the model "
                f"{self.config.vocab_size}. Give the dense model that the recursive one was made from."
            )
        return teacher

    # --- Output folder -------------------------------------------------------------------------------------------

    def check_output(self) -> None:
        """Check that a new run may write into ``output``; one without checkpoints and model may be replaced.

        Raises:
            OutputError: The folder is not empty, or the disk is too small.
        """
        if checkpoints.list_checkpoints(self.checkpoints) and not self.overwrite:
            raise OutputError(
                f"'{self.output}' already contains a run. Continue it (--resume), replace it (--overwrite), or choose "
                f"another -o."
            )
        failed = (self.checkpoints / checkpoints.RUN_FILE).exists() and not (self.output / "config.json").exists()
        # Each checkpoint has the weights and AdamW's two moments in float32; the model is written at the end.
        size = sum(file.stat().st_size for file in self.source.glob("*.safetensors"))
        check_target(self.output, self.source, overwrite=self.overwrite or failed, num_bytes=4 * size)

    def begin(self) -> None:
        """Create ``output`` and delete its old contents. Call it after everything that can be refused."""
        shutil.rmtree(self.output, ignore_errors=True)
        checkpoints.write_run(self.checkpoints, self._fixed())

    def find_resumed(self) -> Path | None:
        """The newest intact checkpoint of the run in ``output``.

        Raises:
            TrainingError: The folder has no run.
            SettingsError: That run has other settings.
        """
        checkpoints.check_run(self.checkpoints, self._fixed())
        return checkpoints.newest_intact(self.checkpoints)

    def _fixed(self) -> dict[str, Any]:
        """The facts that must not change when the run is resumed."""
        model = str(self.source.absolute())
        return {"model": model, "num_processes": self.state.num_processes, **self.settings.to_dict()}

    def publish(
        self,
        config: RecursiveConfig,
        tokenizer: Any,
        result: UptrainResult,
        data_name: str,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        """Complete the weights in :attr:`scratch` to a model with config and tokenizer, and move it into ``output``.

        The record gets the result, the name of the training data, and the fingerprint of the trained model.
        """
        entry = {
            "recursify_version": version("recursify"),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "data_name": data_name,
            "hub_datasets": [name for name in self.settings.data or () if not Path(name).exists()],
            "tokens": result.tokens,
            "steps": result.steps,
            "num_processes": self.state.num_processes,
            "settings": self.settings.to_dict(),
            "before": result.before,
            "after": result.after,
        }
        record = read_record(self.source)
        # Evaluations of the source are not valid for the trained model.
        record |= {"evaluation": [], "fingerprint": fingerprint, "history": [*record.get("history", []), entry]}
        write_model_files(self.scratch, config, record)
        tokenizer.save_pretrained(self.scratch)
        if (self.source / GENERATION_FILE).exists():
            shutil.copyfile(self.source / GENERATION_FILE, self.scratch / GENERATION_FILE)
        # config.json is moved last: a folder without it is not a model, so an interruption leaves no incomplete model.
        for file in sorted(self.scratch.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, self.output / file.name)
        self.scratch.rmdir()


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{name} does not load: {str(error).splitlines()[0]}") from error


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


class Objective(ABC):
    """The loss of a micro-batch, and the changes to the model that go with it.

    It is called inside the model's forward (``RecursiveForCausalLM.forward(objective=…)``), where sharded weights are
    gathered, and can therefore compute logits chunk by chunk.

    Args:
        settings: Settings of the stage.
        teacher: The dense model, frozen; None where the settings need none.
    """

    def __init__(self, settings: UptrainSettings, teacher: PreTrainedModel | None):
        self.settings = settings
        self.teacher = teacher

    def prepare(self, model: RecursiveForCausalLM) -> None:
        """Change a freshly loaded model in place, before it is trained or a checkpoint is loaded into it."""

    def forward_arguments(self, model: RecursiveForCausalLM, num_recursions: int) -> dict[str, Any]:
        """Additional arguments of the model's forward, for a step that runs ``num_recursions`` recursions."""
        return {}

    def begin_step(self, step: int, max_steps: int) -> None:
        """Set the state for ``step`` (from 0) of ``max_steps``; called before each of its micro-batches.

        The state must depend on settings and step only, so that all ranks and a resumed run agree, and must not change
        during the step, so that recomputed activations are the same.
        """

    def calibrate(self, model: RecursiveForCausalLM, sequences: Callable[[int], list[Tensor]]) -> bool:
        """Calibrate the trained model before the last evaluation, and return whether anything changed.

        Args:
            model: The trained model, in eval mode. All ranks call this with the same text.
            sequences: Function from a number of tokens to training sequences ``[1, T]`` with at least that many.
        """
        return False

    def finish(self, model: RecursiveForCausalLM) -> None:
        """Change the trained model in place before it is written."""

    @abstractmethod
    def __call__(
        self, model: RecursiveForCausalLM, outputs: RecursiveOutput, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """The loss summed over predicted tokens, and summed figures, ``tokens`` among them."""
