"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

import recursify
from recursify.engine import Engine

from .errors import Failsafe, add_handlers
from .guard import Guard
from .host import EngineHost
from .request_log import RequestLog
from .routes import router
from .settings import ServerSettings


def create_app(build: Callable[[], Engine], settings: ServerSettings) -> FastAPI:
    """A server that begins to load its engine when it starts, and answers when that is done.

    Args:
        build: Makes the engine, with its tokenizer; called in another thread, and again for a restart.
        settings: Names, key and limits.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(host.load())
        yield
        if not loading.done():
            await loading
        await host.close()

    host = EngineHost(build, settings)
    # FastAPI's own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="Recursify", version=recursify.__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.host = host
    app.include_router(router)
    add_handlers(app)
    for layer, arguments in ((Guard, {"settings": settings}), (Failsafe, {}), (RequestLog, {})):
        app.add_middleware(layer, **arguments)
    return app
