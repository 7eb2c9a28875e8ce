"""The worker's clockwork: says it is alive, rings for work that nobody heard of, and looks for work itself."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from app.contract.blobs import Blobs
from app.contract.queue import Doorbell
from app.contract.records import WorkerRecord
from app.contract.resumable import remove_expired
from app.contract.store import JobStore
from worker.checkpoints.keeper import remove_of_ended
from worker.dispatcher import Dispatcher

log = logging.getLogger("tersor.sweeper")

SWEEP_SECONDS = 1.0
SEEN_EVERY_SECONDS = 3.0
BATCH = 100  # messages a sweep; the rest is due a second later
STALE_UPLOAD_SECONDS = 24 * 3600.0  # no upload takes a day between two of its chunks
TIDY_EVERY_SECONDS = 3600.0
EXPIRE_EVERY_SECONDS = 60.0


class Sweeper:
    """Runs in a thread of its own until it is stopped."""

    def __init__(
        self, store: JobStore, blobs: Blobs, doorbell: Doorbell, dispatcher: Dispatcher, worker: WorkerRecord
    ) -> None:
        self._store, self._blobs, self._doorbell, self._dispatcher = store, blobs, doorbell, dispatcher
        self._worker = worker
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._seen_at = self._tidied_at = self._expired_at = float("-inf")

    def start(self) -> None:
        """Begins with the first sweep."""
        self._thread.start()

    def stop(self) -> None:
        """Returns when the sweep in progress is over."""
        self._stopping.set()
        self._thread.join()

    def sweep(self) -> None:
        """One round."""
        now = datetime.now(UTC)
        if time.monotonic() - self._seen_at > SEEN_EVERY_SECONDS:
            self._store.worker_seen(dataclasses.replace(self._worker, last_seen_at=now))
            self._seen_at = time.monotonic()
        self._dispatcher.look()
        for work_id in self._store.due(now, BATCH):
            if not self._doorbell.ring(work_id):
                break  # a broker that does not answer would hold up each of them
        if time.monotonic() - self._tidied_at > TIDY_EVERY_SECONDS:
            self._blobs.remove_stale_incoming(STALE_UPLOAD_SECONDS)
            self._tidied_at = time.monotonic()
        if time.monotonic() - self._expired_at > EXPIRE_EVERY_SECONDS:
            remove_expired(self._store, self._blobs)
            remove_of_ended(self._store, self._blobs)
            self._expired_at = time.monotonic()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.sweep()
            except SQLAlchemyError as error:
                log.warning("the database does not answer: %s", error)
            except Exception:
                log.exception("a sweep failed; the next one tries again")
            self._stopping.wait(SWEEP_SECONDS)
