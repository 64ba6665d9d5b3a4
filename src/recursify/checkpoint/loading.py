"""Load a model for inference from a recursive folder, a dense folder, a ``.gguf``, an embedded model or a Hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recursify.errors import CheckpointError, SettingsError
from recursify.modeling import RecursiveConfig
from recursify.settings import require_device

from .dense_checkpoint import load_dense_folder, load_tokenizer, open_checkpoint
from .generation_defaults import eos_tokens, read_generation_config
from .sources import locate

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Names of dtypes that a model can be loaded in; ``auto`` is the dtype on disk."""


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    recursions: int | None = None,
    residual_scale: float | None = None,
    anderson: int = 0,
) -> tuple[PreTrainedModel, Any]:
    """Load a model in eval mode and its tokenizer.

    The EOS tokens of its generation config are joined with those of its config, so that each of them ends a text.

    Args:
        source: Folder, ``.gguf`` file, embedded model or Hub id.
        dtype: One of :data:`DTYPES`.
        device: Device for the weights.
        trust_remote_code: Permission to run code from a dense model's folder.
        recursions: Number of recursions to run instead of the model's own (recursive models only).
        residual_scale: Scale of each layer's update under other ``recursions``; None derives it from their number.
        anderson: Number of earlier recursions that each one is mixed with, under other ``recursions``.

    Raises:
        CheckpointError: The model cannot be loaded.
        SettingsError: The dtype or device is unknown, or the model cannot run this number of recursions.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"Unknown dtype '{dtype}'. Use one of: {', '.join(DTYPES)}.")
    target = require_device(device)
    path = locate(source, code=trust_remote_code)
    generation_config = read_generation_config(path) if path.is_dir() else None
    if is_recursive(path):
        read_config(path)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"'{path}' does not load: {str(error).splitlines()[0]}") from error
        model = model.to(target).eval()
    else:
        model, tokenizer = _load_dense(source, path, dtype, trust_remote_code)
        model = model.to(target)
    if generation_config is not None:
        model.generation_config = generation_config
    model.generation_config.eos_token_id = sorted(eos_tokens(model)) or None
    if recursions is not None:
        require_recursive_model(model, source)
        try:
            scale = "auto" if residual_scale is None else residual_scale
            model = model.with_recursions(recursions, residual_scale=scale, anderson=anderson)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return model, tokenizer


def _load_dense(
    source: str | Path, path: Path, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense model of any family, and its tokenizer."""
    if path.is_file():
        checkpoint = open_checkpoint(source)
        model = checkpoint.load_model(None if dtype == "auto" else getattr(torch, dtype))
        return model, load_tokenizer(checkpoint)
    model = load_dense_folder(path, dtype, trust_remote_code=trust_remote_code)
    try:
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"The tokenizer of '{source}' does not load: {error}") from error


def read_config(folder: Path) -> RecursiveConfig:
    """Config of a recursive model.

    Raises:
        CheckpointError: It is damaged, or a field has a wrong type or value.
    """
    try:
        return RecursiveConfig.from_pretrained(folder)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"'{folder}' has a config that does not load: {' '.join(str(error).split())}") from error


def is_recursive(path: Path) -> bool:
    """Tell whether ``path`` is the folder of a recursive model."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type") == "recursive"
    except (OSError, ValueError):
        return False


def require_recursive(model: str | Path) -> Path:
    """Path of a recursive model's folder; a CheckpointError if ``model`` is not one."""
    folder = Path(model)
    if not folder.is_dir():
        raise CheckpointError(f"There is no model folder at '{folder}'.")
    if not is_recursive(folder):
        raise CheckpointError(
            f"'{folder}' is not a recursive model (model_type in config.json is not 'recursive'). Convert one with: "
            f"recursify convert {folder} -o OUTPUT"
        )
    return folder


def require_recursive_model(loaded: PreTrainedModel, source: str | Path) -> None:
    """Raise a SettingsError if the model loaded from ``source`` is a dense one."""
    if loaded.config.model_type != "recursive":
        raise SettingsError(f"'{source}' is a dense model, and this needs a recursive one. Convert it first.")


def require_exit(config: Any, source: str | Path, depth: int) -> None:
    """Raise a SettingsError if a model has no exit after ``depth``."""
    exits = getattr(config, "exit_depths", ())
    if depth not in exits:
        available = f"exits after depths {', '.join(map(str, exits))}" if exits else "no exits"
        raise SettingsError(f"'{source}' has {available}, so none at --depth {depth}. Omit --depth for full depth.")
