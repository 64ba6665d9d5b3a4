"""``recursify serve``."""

from __future__ import annotations

from typing import Annotated

import typer

import recursify
from recursify import EngineConfig, ServerSettings

from .from_settings import options_from_settings
from .options import LoadingOptions, ModelArgument

HELP = """
Serve a recursive (or dense) model over OpenAI's API, with a page to try it. Needs `pip install 'recursify[serve]'`.

**Examples**

`recursify serve smollm2-r2`

`recursify serve smollm2-exits --exit head --threshold 0.9 --max-num-seqs 64`

`RECURSIFY_API_KEY=$(openssl rand -hex 16) recursify serve smollm2-r2 --host 0.0.0.0 --port 8080`
"""


@options_from_settings
def command(
    model: ModelArgument,
    loading: LoadingOptions,
    settings: ServerSettings,
    engine: EngineConfig,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; the default accepts this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port to listen on; 0 chooses a free one.", min=0, max=65535)
    ] = 8000,
) -> None:
    recursify.serve_model(model, host=host, port=port, settings=settings, **vars(loading), **vars(engine))
