"""``recursify serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import DeviceOption, DtypeOption, ModelArgument, TrustOption
from .serving_options import (
    ExitOption,
    KVBytesOption,
    MaxDepthOption,
    MaxLengthOption,
    MaxRequestsOption,
    MinDepthOption,
    ThresholdOption,
)

EXAMPLES = """
Serve a recursive (or dense) model to OpenAI's clients, and as a page to try it. Needs `pip install 'recursify[serve]'`.

**Examples**

`recursify serve smollm2-r2`

`recursify serve smollm2-exits --exit head --threshold 0.9 --max-requests 64`

`RECURSIFY_API_KEY=$(openssl rand -hex 16) recursify serve smollm2-r2 --host 0.0.0.0 --port 8080`
"""


def register(app: typer.Typer) -> None:
    app.command("serve", help=EXAMPLES)(serve_command)


def serve_command(
    model: ModelArgument,
    host: Annotated[str, typer.Option("--host", help="Address; the default is reached from this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="RECURSIFY_API_KEY",
            help="What callers must send. The variable is safer: other users see the options of a process.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the model for clients. [default: its folder's]", show_default=False),
    ] = None,
    max_num_seqs: MaxRequestsOption = 32,
    kv_cache_memory_bytes: KVBytesOption = 2**30,
    max_model_len: MaxLengthOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="New tokens of one answer at most.", min=1)] = 4096,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Answers that may wait; more are told to come back.", min=0)
    ] = 256,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", help="Seconds that a request may take.", min=1)
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option("--shutdown-timeout", help="Seconds in which answers are finished at the end.", min=0)
    ] = 30.0,
    exit_policy: ExitOption = None,
    threshold: ThresholdOption = None,
    min_depth: MinDepthOption = 0,
    max_depth: MaxDepthOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    trust_remote_code: TrustOption = False,
) -> None:
    from recursify.server.run import serve_model

    serve_model(
        model,
        host=host,
        port=port,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        model_name=name,
        api_key=api_key or None,
        exit_policy=exit_policy,
        threshold=threshold,
        min_depth=min_depth,
        max_depth=max_depth,
        max_tokens=max_tokens,
        max_queue=max_queue,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_model_len=max_model_len,
    )
