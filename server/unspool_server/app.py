"""The ASGI application: which routes there are and what stands before them. Holds no state but the service given."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from unspool_server import chat, completions, health, models
from unspool_server.errors import add_error_handlers
from unspool_server.keys import KeyRing
from unspool_server.security import Authentication, BodyLimit, RequestIds
from unspool_server.service import Service


def create_app(service: Service) -> FastAPI:
    """The application that serves `service` under its settings, and closes it when it ends itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Unspool", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for module in (health, models, completions, chat):
        app.include_router(module.router)
    add_error_handlers(app)
    _add_gates(app, service)
    return app


def _add_gates(app: FastAPI, service: Service) -> None:
    """The one added last is met first."""
    settings = service.settings
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Authentication, keys=KeyRing(settings.api_keys), loopback_only=settings.on_loopback)
    app.add_middleware(RequestIds)
