"""The ASGI application: routes, middleware and the life of the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

import recursify
from recursify.engine import Engine

from .access_log import AccessLogMiddleware
from .engine_supervisor import EngineSupervisor
from .errors import UncaughtErrorMiddleware, add_error_handlers
from .http_routes import router
from .middleware import RequestGuardMiddleware
from .settings import ServerSettings


def create_app(build: Callable[[], Engine], settings: ServerSettings, *, own_process: bool = False) -> FastAPI:
    """Make an application that loads its engine at start-up, and takes requests once it is loaded.

    Args:
        build: Callable that makes the engine, with its tokenizer; called again for a restart.
        settings: Settings of the server.
        own_process: Run the engine in a process of its own, which has its own interpreter lock and whose crash leaves
            the server alive; ``build`` is pickled for it. Otherwise run it in a thread, with any ``build``.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(supervisor.load())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await supervisor.close()

    supervisor = EngineSupervisor(build, settings, own_process=own_process)
    # FastAPI's own documentation pages load scripts from other sites.
    app = FastAPI(title="Recursify", version=recursify.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.supervisor = supervisor
    app.include_router(router)
    add_error_handlers(app)
    app.add_middleware(RequestGuardMiddleware, settings=settings)
    app.add_middleware(UncaughtErrorMiddleware)
    app.add_middleware(AccessLogMiddleware)
    return app
