"""Option types of the commands that run the engine."""

from __future__ import annotations

from typing import Annotated

import typer

ExitOption = Annotated[
    str | None,
    typer.Option(
        "--exit",
        help="Let tokens exit early, by: head, confidence, entropy, saturation, convergence, divergence, fixed. What "
        "comes out is not what the whole model says.",
        show_default=False,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="Exit above this confidence. [default: as calibrated, else the policy's]",
        show_default=False,
    ),
]
MinDepthOption = Annotated[int, typer.Option("--min-depth", help="First depth that tokens exit after.", min=0)]
MaxDepthOption = Annotated[
    int | None,
    typer.Option("--max-depth", help="Last depth that new tokens run. [default: all]", min=0, show_default=False),
]
MaxRequestsOption = Annotated[int, typer.Option("--max-requests", help="Answers that are made at once.", min=1)]
KVBytesOption = Annotated[int, typer.Option("--kv-bytes", help="Bytes for keys and values.", min=1)]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length", help="Tokens of prompt and answer. [default: the model's context]", min=2, show_default=False
    ),
]
