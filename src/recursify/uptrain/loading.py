"""Loading of the model to train, its tokenizer and its teacher."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, open_checkpoint
from recursify.checkpoint.record import read_record
from recursify.errors import CheckpointError, RecursifyError
from recursify.modeling import RecursiveForCausalLM

from .stage import TrainingRun


def load_trainable_model(run: TrainingRun) -> RecursiveForCausalLM:
    """Load the model in float32, with every recursion.

    Raises:
        CheckpointError: It does not load.
    """
    try:
        return RecursiveForCausalLM.from_pretrained(run.source, dtype=torch.float32, exit_depth=None)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"'{run.source}' does not load: {str(error).splitlines()[0]}") from error


def load_tokenizer(run: TrainingRun) -> Any:
    """Load the model's tokenizer.

    Raises:
        CheckpointError: It does not load.
    """
    try:
        return AutoTokenizer.from_pretrained(run.source)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"The tokenizer in '{run.source}' does not load: {str(error).splitlines()[0]}") from error


def load_teacher(run: TrainingRun, *, needed: bool) -> PreTrainedModel | None:
    """Load the dense teacher, frozen and in eval mode.

    Args:
        run: The run.
        needed: True to load the teacher even if ``kl_weight`` is 0; otherwise the result is None then.
    """
    settings = run.settings
    if not settings.kl_weight and not needed:
        return None
    checkpoint = open_teacher(run, needed=needed)
    dtype = None if settings.teacher_dtype == "auto" else getattr(torch, settings.teacher_dtype)
    return checkpoint.load_model(dtype).to(settings.teacher_device or run.state.device).requires_grad_(False)


def open_teacher(run: TrainingRun, *, needed: bool) -> DenseCheckpoint:
    """Open the checkpoint of the dense teacher.

    Raises:
        CheckpointError: It is missing, or has another vocabulary.
    """
    alternative = "" if needed else ", or --kl-weight 0 to learn from the data alone"
    name = run.settings.teacher or read_record(run.source).get("plan", {}).get("source")
    if name is None:
        raise CheckpointError(
            f"'{run.source}' does not name the dense model it was made from. Give --teacher{alternative}."
        )
    try:
        checkpoint = open_checkpoint(name)
    except RecursifyError as error:
        raise CheckpointError(f"The teacher does not open: {error} Give another --teacher{alternative}.") from error
    if checkpoint.config.vocab_size != run.config.vocab_size:
        raise CheckpointError(
            f"The vocabulary of the teacher '{name}' has {checkpoint.config.vocab_size} tokens, that of the model "
            f"{run.config.vocab_size}. Give the dense model that the recursive one was made from."
        )
    return checkpoint
