"""What every attempt needs: its child, its inputs, its limits, and the patience to write down what came of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol, TypeVar

from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import OperationalError

from app.contract.blobs import Blobs
from app.contract.errors import (
    BlobMissing,
    LeaseLost,
    Problem,
    ServiceUnavailable,
)
from app.contract.queue import Doorbell
from app.contract.records import UploadRecord
from app.contract.store import JobStore
from app.settings import Settings
from worker import limits
from worker.checkpoints.keeper import CheckpointKeeper
from worker.lease import LeaseKeeper
from worker.messages import CheckpointWritten, Failed, Progress, Result
from worker.process import Child, Stopped, Task
from worker.scratch import printed

log = logging.getLogger("tersor.supervise")

STOP_GRACE_SECONDS = 1.0  # a worker that is told to leave has a few seconds in all
RETRY_SECONDS = 1.0
COPY_PAUSES = (0.5, 1.0, 2.0)  # seconds between tries: a store that hiccups is back by then

T = TypeVar("T")


class Party(Protocol):
    """What else is to be done while a child runs."""

    def turn(self) -> None:
        """Called several times a second; what it raises ends the child."""


class Trouble(Exception):
    """The worker's own: the attempt is repeated. `problem` is what remains where it was the last one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True)
class Entries:
    """What children run, as "module:function"."""

    job: str = "worker.entries:job"
    inspection: str = "worker.entries:inspection"


class Supervision:
    """What the kinds of attempts stand on. `stopping` ends all of them."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        blobs: Blobs,
        doorbell: Doorbell,
        context: ForkServerContext,
        entries: Entries = Entries(),
    ) -> None:
        self._settings, self._store, self._blobs, self._doorbell = settings, store, blobs, doorbell
        self._context, self._entries = context, entries
        self.stopping = threading.Event()

    def _is_to_stop(self, keeper: LeaseKeeper) -> bool:
        return keeper.verdict is not None or self.stopping.is_set()

    def _supervised(
        self,
        task: Task,
        keeper: LeaseKeeper,
        checkpoints: CheckpointKeeper | None = None,
        party: Party | None = None,
    ) -> Result:
        """Runs the task's child to its end. Raises Stopped once the child's group is gone."""

        def stop() -> bool:
            if party is not None:
                party.turn()
            return self._is_to_stop(keeper)

        def heard(said: Progress | CheckpointWritten) -> None:
            if isinstance(said, Progress):
                keeper.note(said.progress, said.step)
            elif checkpoints is not None:
                checkpoints.offer(said)

        try:
            with Child(self._context, task) as child:
                try:
                    result = child.result(heard, stop)
                except Stopped:
                    grace = STOP_GRACE_SECONDS if self.stopping.is_set() else self._settings.cancel_grace_seconds
                    child.end(0.0 if keeper.verdict == "lost" else grace)
                    raise
        finally:
            if text := printed(task.attempt):
                log.info("%s printed:\n%s", task.attempt.name, text)
        if isinstance(result, Failed) and result.fault is not None:
            log.error("%s: %s", task.attempt.name, result.fault)
        return result

    def _fetch(self, keeper: LeaseKeeper, upload: UploadRecord, path: Path) -> Path:
        def fetch() -> None:
            path.unlink(missing_ok=True)
            self._blobs.fetch(self._blobs.blob_key(upload.sha256), path)

        self._copy(keeper, f"the {upload.kind} could not be copied", fetch)
        return path

    def _copy(self, keeper: LeaseKeeper, what: str, copy: Callable[[], T]) -> T:
        """Tries a few times while the lease holds. Raises Trouble at the end, Stopped where the work is to stop."""
        for pause in (*COPY_PAUSES, None):
            try:
                return copy()
            except (OSError, StoreError, BlobMissing) as error:
                log.warning("%s: %s", what, error)
                if pause is None:
                    raise Trouble(_copy_problem(what, error)) from error
            if self.stopping.wait(pause) or keeper.verdict is not None:
                raise Stopped
        raise AssertionError("the last try returns or raises")

    def _limits(self, seconds: float) -> limits.Limits:
        settings = self._settings
        return limits.Limits(
            memory_bytes=limits.memory_of_one_job(settings.job_memory_bytes, settings.worker_concurrency),
            disk_bytes=settings.job_disk_bytes,
            seconds=seconds,
            processes=settings.job_processes,
            threads=limits.threads_of_one_job(settings.worker_threads, settings.worker_concurrency),
        )

    def _insist(self, keeper: LeaseKeeper, write: Callable[[], T]) -> T:
        """Writes a verdict, also when the database is away for a while: hours of work may hang on it."""
        while True:
            try:
                return write()
            except OperationalError as error:
                if keeper.verdict == "lost":
                    raise LeaseLost() from error
                log.warning("the database does not take the verdict; trying again: %s", error)
                time.sleep(RETRY_SECONDS)


def _copy_problem(what: str, error: Exception) -> Problem:
    if isinstance(error, BlobMissing):
        return error.problem()
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return ServiceUnavailable(f"In every attempt {what}: {reason}. Try again later.").problem()
