"""The recursive model of an installed recursify: every part, for every configuration.

A checkpoint carries only the classes that its configuration uses (``RecursiveConfig.auto_map``); these here load all
checkpoints.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from transformers.dynamic_module_utils import get_relative_import_files

from . import modeling_recursive_anderson, modeling_recursive_exits, modeling_recursive_routed
from .configuration_recursive import RecursiveConfig
from .modeling_recursive import RecursiveModel as PlainModel
from .recursion_count import with_recursions
from .recursive_base import RecursivePreTrainedModel
from .saved_generation import savable

FORMER_FILES = ("recursive_loops.py", "recursive_thresholds.py")
"""Files in checkpoints of earlier versions that have other names now."""


def code_files(auto_map: Mapping[str, str], folder: Path) -> tuple[str, ...]:
    """Files in ``folder`` with the classes of ``auto_map``, and the files that these import.

    Raises:
        OSError: One of them cannot be read.
    """
    entries = [folder / f"{module}.py" for module in {name.partition(".")[0] for name in auto_map.values()}]
    imports = [file for entry in entries for file in get_relative_import_files(entry)]
    return tuple(sorted({Path(file).name for file in (*entries, *imports)}))


def travelling_files(config: RecursiveConfig) -> tuple[str, ...]:
    """Files of this package that a checkpoint of ``config`` carries, to load where recursify is not installed."""
    return code_files(config.auto_map, Path(__file__).parent)


def copy_travelling_files(config: RecursiveConfig, folder: str | os.PathLike[str]) -> None:
    """Copy the files that a checkpoint of ``config`` carries into ``folder``, and remove other ones of ours."""
    needed = travelling_files(config)
    for file in {*FORMER_FILES, *(path.name for path in Path(__file__).parent.glob("*recursive*.py"))} - {*needed}:
        (Path(folder) / file).unlink(missing_ok=True)
    for file in needed:
        shutil.copyfile(Path(__file__).with_name(file), Path(folder) / file)


class SavesCode(RecursivePreTrainedModel):
    """Base of the classes that save a model with its code."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **kwargs: Any) -> None:
        """Save the model with the code that its configuration uses; arguments are those of transformers.

        Raises:
            ValueError: A generation config that transformers does not write (:func:`savable`).
        """
        generation_config = getattr(self, "generation_config", None)
        try:
            if generation_config is not None:
                self.generation_config = savable(generation_config)
            super().save_pretrained(save_directory, *arguments, **kwargs)
        finally:
            if generation_config is not None:
                self.generation_config = generation_config
        copy_travelling_files(self.config.as_saved(), save_directory)


class RecursiveModel(SavesCode, modeling_recursive_anderson.RecursiveModel, modeling_recursive_routed.RecursiveModel):
    """Embedding, prelude, shared block, coda and final norm: ``input_ids [B, T] -> last_hidden_state [B, T, D]``."""


class RecursiveForCausalLM(
    SavesCode,
    modeling_recursive_routed.RecursiveForCausalLM,
    modeling_recursive_exits.RecursiveForCausalLM,
    modeling_recursive_anderson.RecursiveForCausalLM,
):
    """A recursive model with its language-modelling head."""

    base_model_class: ClassVar[type[PlainModel]] = RecursiveModel

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with the checks of ``recursify push``; options are those of transformers.

        The classes in a checkpoint, which work without recursify, keep transformers' own ``push_to_hub``.

        Raises:
            HubError: An option that is not supported, files that must not be uploaded, or a refusal of the Hub.
            ParityError: The saved model does not load in a fresh process, or differs from its fingerprint.
        """
        # By name and on call: ``hub`` is built on this package, which imports nothing of it.
        return import_module("recursify.hub.push").push_loaded_model(self, repo_id, **options)

    def with_recursions(
        self, num_recursions: int, *, residual_scale: float | Literal["auto"] = "auto", anderson: int = 0
    ) -> Self:
        """A model that applies the shared block ``num_recursions`` times, fewer or more than this one does.

        It has the same shared weights, in the same memory: an in-place change of one model changes both. Depth ``i`` of
        ``n`` takes copies of the parameters of depth ``i · R // n`` here (residuals, norms, biases, window or RoPE),
        and an exit the head of the exit at which its time ends. Thresholds and ``exit_depth``, which were chosen for
        other exits, are dropped unless ``n`` is ``R``.

        Args:
            num_recursions: Number ``n`` of recursions, at least 1. With ``R`` the logits are equal, to the bit.
            residual_scale: Factor on the steps of the shared layers. ``"auto"`` is ``R / n``, a longer or shorter step
                of the same equation (arXiv 2310.12818); 1 keeps the layers as they are.
            anderson: Number of earlier loops mixed into each that repeats a depth, 0 for none. For a block that
                converges; exit policies and speculation refuse it. Recorded ``hidden_states`` are those before mixing.

        Raises:
            ValueError: Fewer than one recursion, routers, a scale that is not positive, or no repeated depth to mix.
        """
        return with_recursions(self, num_recursions, residual_scale=residual_scale, anderson=anderson)
