"""A worker process: everything it holds, its start and its end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from datetime import UTC, datetime
from uuid import uuid4

from celery.worker import state as celery_state
from sqlalchemy.exc import SQLAlchemyError

from app.contract.blobs import Blobs
from app.contract.queue import QUEUE, Doorbell
from app.contract.records import WorkerRecord
from app.contract.store import JobStore
from app.settings import Settings
from worker import forkserver
from worker.celery_app import make_app, make_worker
from worker.dispatcher import Dispatcher
from worker.sandbox.offer import offer
from worker.sandbox.policy import exposed
from worker.scratch import remove_stale
from worker.supervise import Supervisor
from worker.sweeper import Sweeper

log = logging.getLogger("tersor.worker")

# Children get a second after SIGTERM; then their work goes back to the queue.
JOIN_SECONDS = 5.0
# Celery may be waiting for a broker that is gone; it holds nothing that has to be saved.
CELERY_SECONDS = 1.0
RESTART_SECONDS = 1.0


class Service:
    """One worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._me = _identity(walls(settings))
        check_interface(settings.ranks_interface)
        context = forkserver.context()
        forkserver.warm(context)  # first: while there is one thread
        self._store = JobStore.open(
            settings.database, max_attempts=settings.max_attempts, republish_seconds=settings.republish_seconds
        )
        self._store.migrate()
        blobs, doorbell = Blobs.open(settings.blobs), Doorbell(settings.broker)
        self._supervisor = Supervisor(settings, self._store, blobs, doorbell, context)
        self._dispatcher = Dispatcher(
            self._store,
            self._supervisor.run,
            self._me.id,
            settings.lease_seconds,
            settings.worker_concurrency,
            bool(settings.ranks_interface),
        )
        self._sweeper = Sweeper(self._store, blobs, doorbell, self._dispatcher, self._me)
        self._leaving = threading.Event()

    def run(self) -> None:
        """Works until SIGTERM or SIGINT; every job is back in the queue when it returns."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._leaving.set())
        remove_stale(self._settings.scratch)
        self._sweeper.start()
        # In a thread of its own, so that a broker that does not answer cannot keep the process from leaving.
        listener = threading.Thread(target=self._listen, name="celery", daemon=True)
        listener.start()
        log.info("worker %s takes work from %s", self._me.id, ", ".join(self._me.queues))
        log.info("sandbox: %s", self._me.sandbox)
        self._leaving.wait()
        self._leave(listener)

    def _listen(self) -> None:
        app = make_app(self._settings, self._dispatcher.wake)
        while not self._leaving.is_set():
            make_worker(app, self._me.id).start()
            self._leaving.wait(RESTART_SECONDS)  # Celery gave up on something: it starts afresh

    def _leave(self, listener: threading.Thread) -> None:
        log.info("worker %s leaves", self._me.id)
        self._dispatcher.refuse()
        celery_state.should_stop = os.EX_OK
        self._supervisor.stopping.set()
        self._sweeper.stop()
        self._dispatcher.join(JOIN_SECONDS)
        listener.join(CELERY_SECONDS)
        try:
            self._store.worker_gone(self._me.id)
        except SQLAlchemyError as error:
            log.warning("the database does not answer: %s", error)
        self._store.close()


def walls(settings: Settings) -> str:
    """Which walls stand around this worker's jobs, as an operator reads it. Raises SystemExit where more are required.

    Not enough that the kernel offers them: they hold nothing off from what lies among the libraries that jobs read.
    """
    if settings.sandbox == "off":
        return "off (TERSOR_SANDBOX=off)"
    have = offer()
    trouble = [] if have.complete else [have.sentence()]
    trouble += [f"jobs can read {folder}, which lies among libraries" for folder in exposed(settings)]
    if trouble and settings.sandbox == "require":
        raise SystemExit(f"TERSOR_SANDBOX=require, but the sandbox is not complete: {'; '.join(trouble)}.")
    for line in trouble:
        log.warning("sandbox: %s", line)
    return "; ".join(trouble) or have.sentence()


def check_interface(name: str) -> None:
    """Raises SystemExit where trainings over several hosts are to use a network interface that is not there."""
    known = [found for _, found in socket.if_nameindex()]
    if name and name not in known:
        raise SystemExit(f"TERSOR_RANKS_INTERFACE={name}: there is no such interface; there are {', '.join(known)}.")


def _identity(sandbox: str) -> WorkerRecord:
    """The process's name in claims; the random part tells apart two processes that got one number in turn."""
    host, pid = socket.gethostname(), os.getpid()
    return WorkerRecord(f"{host}-{pid}-{uuid4().hex[:8]}", host, pid, (QUEUE,), datetime.now(UTC), sandbox)
