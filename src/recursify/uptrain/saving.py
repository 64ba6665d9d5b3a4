"""Check that a model can be saved, before it is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from recursify.checkpoint.generation_defaults import FILE as GENERATION_FILE
from recursify.errors import CheckpointError
from recursify.modeling import RecursiveConfig
from recursify.modeling.saved_generation import savable


def check_saving(
    source: Path, config: RecursiveConfig, tokenizer: Any, generation_config: GenerationConfig | None = None
) -> None:
    """Save what was loaded from ``source``, except weights, into a temporary folder.

    Raises:
        CheckpointError: A part loads and cannot be saved.
    """
    saves = {"config.json": config.save_pretrained, "tokenizer": tokenizer.save_pretrained}
    if generation_config is not None:
        saves[GENERATION_FILE] = lambda folder: savable(generation_config).save_pretrained(folder)
    with tempfile.TemporaryDirectory() as folder:
        for name, save in saves.items():
            try:
                save(folder)
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"The {name} of '{source}' loads and cannot be saved, so training would be lost: "
                    f"{' '.join(str(error).split())} Correct it in that folder."
                ) from error
