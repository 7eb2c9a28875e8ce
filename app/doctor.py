"""`tersor doctor`: asks every part that the service stands on whether it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.contract.blobs import Blobs
from app.contract.queue import Doorbell
from app.contract.records import WorkerRecord
from app.contract.store import JobStore
from app.metrics import WORKER_MAX_AGE_SECONDS
from app.settings import Settings


@dataclass(frozen=True)
class Finding:
    """What one part answered."""

    part: str
    ok: bool
    detail: str


def examine(settings: Settings, worker_host: str | None = None) -> list[Finding]:
    """Asks database, broker, blobs and workers; with `worker_host` only whether a worker of that host is alive."""
    workers = _ask("worker", lambda: _workers(settings, worker_host))
    if worker_host is not None:
        return [workers]
    return [
        _ask("database", lambda: _database(settings)),
        _ask("broker", lambda: _broker(settings)),
        _ask("blobs", lambda: _blobs(settings)),
        workers,
        _ask("sandbox", lambda: _sandbox(settings)),
    ]


def _ask(part: str, question: Callable[[], str]) -> Finding:
    try:
        return Finding(part, True, question())
    except Exception as error:  # whatever a driver raises is the finding
        return Finding(part, False, f"{type(error).__name__}: {error}")


def _database(settings: Settings) -> str:
    store = JobStore.open(settings.database)
    try:
        store.ping()
    finally:
        store.close()
    return "answers"


def _broker(settings: Settings) -> str:
    if not Doorbell(settings.broker).ping():
        raise ConnectionError("no answer")
    return "answers"


def _blobs(settings: Settings) -> str:
    Blobs.open(settings.blobs).ping()
    return "can be written"


def _workers(settings: Settings, host: str | None) -> str:
    named = [worker for worker in _alive(settings) if host is None or worker.host == host]
    if not named:
        raise LookupError("no live worker" + (f" on {host}" if host else ""))
    return ", ".join(f"{worker.host} ({worker.pid})" for worker in named)


def _sandbox(settings: Settings) -> str:
    """What the workers said of their own kernels; this process may run on another one."""
    return "; ".join(f"{worker.host}: {worker.sandbox}" for worker in _alive(settings)) or "no worker to ask"


def _alive(settings: Settings) -> list[WorkerRecord]:
    store = JobStore.open(settings.database)
    try:
        return store.live_workers(WORKER_MAX_AGE_SECONDS)
    finally:
        store.close()
