"""The ASGI application: routes, middleware and the life of the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import recursify
from recursify.engine import Engine

from .engine_supervisor import EngineSupervisor
from .errors import add_error_handlers
from .http_routes import answer_other_methods, router
from .middleware import AccessLogMiddleware, RequestGuardMiddleware
from .settings import ServerSettings


def create_app(build: Callable[[], Engine], settings: ServerSettings, *, own_process: bool = False) -> FastAPI:
    """Make an application that loads its engine at start-up, and takes requests once it is loaded.

    Args:
        build: Callable that makes the engine, with its tokenizer; called again for a restart.
        settings: Settings of the server.
        own_process: Place of the engine, see :meth:`~recursify.server.engine_process.client.EngineClient.open`.

    Raises:
        SettingsError: The default exit policy is not served.
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
    app.add_exception_handler(405, answer_other_methods)
    app.add_middleware(RequestGuardMiddleware, settings=settings)
    app.add_middleware(AccessLogMiddleware)
    if settings.cors_origin:  # outermost: browsers read errors only if they have its headers, and send no key to ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
