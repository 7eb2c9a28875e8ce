"""The HTTP application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import app.errors
from app import __version__
from app.contract.blobs import Blobs
from app.contract.queue import Doorbell
from app.contract.store import JobStore
from app.endpoints import artifacts, blobs, datasets, health, jobs, models, techniques, uploads
from app.metrics import Metrics
from app.middleware import RequestContext
from app.openapi import describe
from app.services import Services, in_thread
from app.settings import Settings
from app.uploads.tus import TusProtocol


def create_app(settings: Settings) -> FastAPI:
    """The application; database, blobs and broker are opened when it starts and closed when it ends."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        services = await in_thread(_open, settings, metrics)
        api.state.services = services
        try:
            yield
        finally:
            await services.close()

    api = FastAPI(title="Tersor", version=__version__, lifespan=lifespan)
    api.add_middleware(RequestContext, metrics=metrics)
    api.add_middleware(TusProtocol)
    app.errors.install(api)
    # Jobs first: they are polled.
    for endpoints in (jobs, models, datasets, uploads, blobs, artifacts, techniques, health):
        api.include_router(endpoints.router)

    def openapi() -> dict[str, Any]:
        return describe(api, settings.keys_required)

    api.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents
    return api


def _open(settings: Settings, metrics: Metrics) -> Services:
    store = JobStore.open(
        settings.database, max_attempts=settings.max_attempts, republish_seconds=settings.republish_seconds
    )
    store.migrate()
    metrics.watch(store)
    return Services(settings, store, Blobs.open(settings.blobs), Doorbell(settings.broker), metrics)
