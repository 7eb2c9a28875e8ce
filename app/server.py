"""Runs the application on uvicorn."""

from __future__ import annotations

import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.main import create_app
from app.middleware import RequestIds
from app.services import Services
from app.settings import Settings, is_loopback

log = logging.getLogger("tersor.api")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
# A request's head: room for a `spec` in the query; larger ones go into a form.
MAX_HEAD_BYTES = 256 << 10
# Longer than the pause between two polls, so that clients keep their connection.
KEEP_ALIVE_SECONDS = 75
# What running requests get to end after SIGTERM; uploads that take longer are cut off and leave nothing, unless they
# are resumable: these end at once and keep what has come.
GRACE_SECONDS = 8


class Server(uvicorn.Server):
    """uvicorn's server; requests that wait for a change are told when it ends."""

    def __init__(self, config: uvicorn.Config, api: FastAPI) -> None:
        super().__init__(config)
        self._api = api

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM and SIGINT."""
        services: Services | None = getattr(self._api.state, "services", None)
        if services is not None:
            services.closing = True
        super().handle_exit(sig, frame)


def make_server(settings: Settings) -> Server:
    """A server that is ready to run."""
    api = create_app(settings)
    config = uvicorn.Config(
        api,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return Server(config, api)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    _log_request_ids()
    if not settings.keys_required and not is_loopback(settings.host):
        log.warning("OPEN TO ANYONE: bound to %s without API keys (TERSOR_API_KEYS_REQUIRED=false)", settings.host)
    make_server(settings).run()


def _log_request_ids() -> None:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RequestIds())
