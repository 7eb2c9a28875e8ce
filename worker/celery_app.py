"""Celery on the worker's side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.apps.worker import Worker

from app.contract.queue import QUEUE, celery
from app.settings import Settings
from worker.tasks import register

# A broker that hangs is noticed within this, also in the middle of a blocking read (which lasts a second at most).
SOCKET_SECONDS = 10.0
# Messages that a killed worker had fetched and not begun come back after this; the sweep is faster anyway.
VISIBILITY_SECONDS = 60


def make_app(settings: Settings, wake: Callable[[str], None]) -> Celery:
    """The application with its one task."""
    app = celery(
        settings.broker,
        {
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "visibility_timeout": VISIBILITY_SECONDS,
            # kombu looks for such messages every interval x throttle ticks, 100 s by default.
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
        },
    )
    register(app, wake)
    return app


def make_worker(app: Celery, hostname: str) -> Any:
    """Listens on the one queue. One thread is enough: a message only wakes a slot."""
    worker: Worker = app.Worker(
        pool="threads",
        concurrency=1,
        queues=QUEUE,
        hostname=hostname,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
        quiet=True,
    )
    return worker
