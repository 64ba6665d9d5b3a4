"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

import recursify
from recursify.engine import Engine

from .access_log import RequestLog
from .engine_supervisor import EngineSupervisor
from .errors import Failsafe, add_handlers
from .http_routes import router
from .middleware import Guard
from .settings import ServerSettings


def create_app(build: Callable[[], Engine], settings: ServerSettings, *, own_process: bool = False) -> FastAPI:
    """A server that begins to load its engine when it starts, and answers when that is done.

    Args:
        build: Makes the engine, with its tokenizer; called where the engine runs, and again for a restart.
        settings: Names, key and limits.
        own_process: Run the engine in a process of its own, where it shares no interpreter with the server and a
            crash is its own; ``build`` is pickled for that. Else in a thread, with any ``build``.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(host.load())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await host.close()

    host = EngineSupervisor(build, settings, own_process=own_process)
    # FastAPI's own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="Recursify", version=recursify.__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.host = host
    app.include_router(router)
    add_handlers(app)
    for layer, arguments in ((Guard, {"settings": settings}), (Failsafe, {}), (RequestLog, {})):
        app.add_middleware(layer, **arguments)
    return app
