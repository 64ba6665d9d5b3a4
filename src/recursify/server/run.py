"""The server on a port, from the first log line to the last answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from recursify.engine import Engine
from recursify.errors import EngineError, RecursifyError

from .access_log import JsonLines, log_event
from .app import create_app
from .engine_supervisor import EngineSupervisor
from .settings import ServerSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS = 2048
"""More are told 503 at once."""


class Server(uvicorn.Server):
    """uvicorn, which lets answers come to their end before it ends, and ends if the model does not load."""

    def __init__(self, config: uvicorn.Config, host: EngineSupervisor) -> None:
        super().__init__(config)
        self.host = host

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self.host.load_error is not None and not self.host.has_loaded:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, finish those there are, tell the rest, and close."""
        log_event("info", "shutting down")
        finishing = asyncio.create_task(self.host.finish())
        await super().shutdown(sockets)
        await finishing


def serve(build: Callable[[], Engine], settings: ServerSettings, *, address: str, port: int) -> None:
    """Answer requests at ``address`` and ``port`` until a signal ends it, with the engine in a process of its own.

    Args:
        build: Makes the engine, with its tokenizer. It is pickled: a function of a module, or a ``partial`` of one.
        settings: Names, key and limits.
        address: To listen at.
        port: To listen at; 0 takes a free one.

    Raises:
        RecursifyError: The model does not load, or the port is taken.
    """
    log_to_stderr()
    listener = listen(address, port)
    number = listener.getsockname()[1]
    app = create_app(build, settings, own_process=True)
    server = Server(config_of(app, settings), app.state.host)
    name = f"[{address}]" if ":" in address else address
    log_event("info", "listening", url=f"http://{name}:{number}", key="required" if settings.api_key else "none")
    if address not in LOOPBACK and settings.api_key is None:
        log_event("warning", "anyone who reaches this address can use it: there is no API key", host=address)
    server.run(sockets=[listener])
    error = server.host.load_error
    if error is not None and not server.host.has_loaded:
        raise error if isinstance(error, RecursifyError) else EngineError(f"The model did not load: {error}")


def listen(address: str, port: int) -> socket.socket:
    """A socket at ``address`` and ``port``; port 0 takes a free one.

    Raises:
        EngineError: It cannot be had.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise EngineError(
            f"Cannot listen on {address} port {port}: {error.strerror}. Choose another --port."
        ) from error
    return listener


def config_of(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn runs ``app``."""
    return uvicorn.Config(
        app,
        # Its parser in C costs a token 6 microseconds less, and takes headers of any size.
        http="h11",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        # Answers are ended by then, and their readers get some seconds to take the last of them.
        timeout_graceful_shutdown=round(settings.shutdown_seconds) + 5,
    )


def log_to_stderr() -> None:
    """Have this server's logs, and uvicorn's warnings, written as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("recursify.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
