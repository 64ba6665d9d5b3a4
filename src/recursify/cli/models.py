"""Opening whatever a command was pointed at: a recursive folder, a dense folder, a ``.gguf``, a Hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import recursify.modeling  # noqa: F401  (registers recursive models)
from recursify.checkpoint.dense_checkpoint import load_tokenizer, locate, open_checkpoint
from recursify.errors import CheckpointError, SettingsError
from recursify.settings import require_device


def is_recursive(path: Path) -> bool:
    """Whether ``path`` is the folder of a recursive model."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "recursive"
    except (OSError, ValueError):
        return False


def require_recursive(path: Path) -> None:
    """Raises:
    CheckpointError: ``path`` is not the folder of a recursive model.
    """
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder at '{path}'.")
    if not is_recursive(path):
        raise CheckpointError(
            f"'{path}' is not a recursive model (its config.json does not say model_type 'recursive'). Make one with: "
            f"recursify convert {path} -o OUTPUT"
        )


def load_model(
    source: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model in eval mode, and its tokenizer.

    Raises:
        CheckpointError: It cannot be loaded.
        SettingsError: Unknown dtype or device.
    """
    if dtype != "auto" and dtype not in ("float32", "bfloat16", "float16"):
        raise SettingsError(f"Unknown dtype '{dtype}'. Use float32, bfloat16, float16 or auto.")
    place = require_device(device)
    path = locate(source)
    if is_recursive(path):
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"'{path}' does not load: {str(error).splitlines()[0]}") from error
        return model.to(place).eval(), tokenizer
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    return checkpoint.load_model(wanted).to(place), load_tokenizer(checkpoint)


def require_exit(config: Any, model: str, depth: int) -> None:
    """Raises:
    SettingsError: The model has no exit after ``depth``.
    """
    exits = getattr(config, "exit_depths", ())
    if depth not in exits:
        having = f"exits after depths {', '.join(map(str, exits))}" if exits else "no exits"
        raise SettingsError(f"'{model}' has {having}, so none at --depth {depth}. Leave it out for full depth.")


def require_recursive_model(loaded: PreTrainedModel, model: str) -> None:
    """Raises:
    SettingsError: A dense model.
    """
    if loaded.config.model_type != "recursive":
        raise SettingsError(f"'{model}' is a dense model, and this needs a recursive one. Convert it first.")


def with_recursions(
    loaded: Any, model: str, recursions: int | None, residual_scale: float | None, anderson: int
) -> PreTrainedModel:
    """What was loaded from ``model``, run so many times; as it is without a number.

    Raises:
        SettingsError: A dense model, or what its recursions cannot be.
    """
    if recursions is None:
        return loaded
    require_recursive_model(loaded, model)
    scale = "auto" if residual_scale is None else residual_scale
    try:
        return loaded.with_recursions(recursions, residual_scale=scale, anderson=anderson)
    except ValueError as error:
        raise SettingsError(str(error)) from error
