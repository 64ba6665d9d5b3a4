"""Serve a model over HTTP, with the engine in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from recursify.engine import Engine, EngineConfig
from recursify.errors import SettingsError
from recursify.settings import check_keys, resolve_settings

from .settings import ServerSettings


def serve_model(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServerSettings | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Serve OpenAI's API and a chat page until a signal ends the process.

    Args:
        model: Folder, ``.gguf`` file or Hub id of a recursive or dense model.
        host: Address to listen on; the default accepts connections from this machine only.
        port: Port to listen on; 0 chooses a free one.
        settings: Settings of the server; exclusive with their fields in ``options``.
        dtype: Data type of the weights: float32, bfloat16, float16, or auto for the checkpoint's.
        device: Device of the engine: cpu, cuda, cuda:1 or mps.
        trust_remote_code: Permission to run Python code from the model's folder.
        options: Fields of :class:`~recursify.server.settings.ServerSettings` and of
            :class:`~recursify.engine.EngineConfig`.

    Raises:
        SettingsError, EngineError: An invalid setting, or the extra ``serve`` is not installed.
        RecursifyError: The model does not load, or the port is taken.
    """
    names = list(ServerSettings.__dataclass_fields__)
    check_keys(options, [*names, *EngineConfig.__dataclass_fields__], None)
    server_options = {name: options.pop(name) for name in names if name in options}
    settings = resolve_settings(ServerSettings, settings, server_options)
    if settings.model_name is None:
        settings = replace(settings, model_name=Path(model).name)
    EngineConfig(**options)  # here as well as in the engine's process, so that an invalid value fails at once
    try:
        from .uvicorn_server import run_server
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"The server needs {error.name}, which is not installed. Install it with: pip install 'recursify[serve]'"
        ) from error
    options |= {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    run_server(partial(Engine.from_pretrained, model, **options), settings, host=host, port=port)
