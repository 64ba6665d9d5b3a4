"""The HTTP server: socket, uvicorn's configuration, logging and graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from recursify.engine import Engine
from recursify.errors import EngineError, RecursifyError

from .access_log import JsonFormatter, log_event
from .app import create_app
from .engine_supervisor import EngineSupervisor
from .settings import ServerSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS = 2048
"""Maximum number of connections; further ones get status 503 at once."""


class Server(uvicorn.Server):
    """uvicorn server that finishes running requests before it exits, and exits if the model does not load."""

    def __init__(self, app: FastAPI) -> None:
        self.supervisor: EngineSupervisor = app.state.supervisor
        config = uvicorn.Config(
            app,
            # httptools, uvicorn's parser in C, would save 6 microseconds per token, but accepts headers of any size.
            http="h11",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            # The supervisor has ended all requests by then; clients get 5 seconds to read the last events.
            timeout_graceful_shutdown=round(self.supervisor.settings.shutdown_timeout) + 5,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        """Check ten times a second whether the model failed to load."""
        if self.supervisor.load_error is not None and not self.supervisor.has_loaded:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, finish the running ones, fail those that take too long, and close."""
        log_event("info", "shutting down")
        finishing = asyncio.create_task(self.supervisor.finish())
        await super().shutdown(sockets)
        await finishing


def run_server(build: Callable[[], Engine], settings: ServerSettings, *, host: str, port: int) -> None:
    """Serve requests until a signal ends the process, with the engine in a process of its own.

    The arguments are those of :func:`~recursify.server.app.create_app` and :func:`listen`.

    Raises:
        RecursifyError: The model does not load, or the port is taken.
    """
    log_to_stderr()
    listener = listen(host, port)
    number = listener.getsockname()[1]
    server = Server(create_app(build, settings, own_process=True))
    name = f"[{host}]" if ":" in host else host
    log_event("info", "listening", url=f"http://{name}:{number}", key="required" if settings.api_key else "none")
    if host not in LOOPBACK and settings.api_key is None:
        log_event("warning", "no API key is set: anyone who reaches this address can use the server", host=host)
    server.run(sockets=[listener])
    error = server.supervisor.load_error
    if error is not None and not server.supervisor.has_loaded:
        raise error if isinstance(error, RecursifyError) else EngineError(f"The model did not load: {error}")


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket, or raise an EngineError; port 0 chooses a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise EngineError(f"Cannot listen on {host} port {port}: {error.strerror}. Choose another --port.") from error
    return listener


def log_to_stderr() -> None:
    """Write this server's logs, and uvicorn's warnings, to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name, level in (("recursify.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
