"""Which workers live, and how much there is of everything."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.contract.records import UploadKind, WorkerRecord
from app.contract.states import JobState, UploadStatus
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.store.leases import QUEUED, waits_for_inspection
from app.contract.tables import jobs, uploads, work, workers


class Fleet(StoreBase):
    """The statements on `workers`, and the counts for metrics."""

    def worker_seen(self, worker: WorkerRecord) -> None:
        """Notes that a worker is alive."""
        values = {
            "id": worker.id,
            "host": worker.host,
            "pid": worker.pid,
            "queues": ",".join(worker.queues),
            "last_seen_at": worker.last_seen_at,
            "sandbox": worker.sandbox,
        }
        if self._update_worker(values):
            return
        try:
            with self._write() as connection:
                connection.execute(insert(workers).values(values))
        except IntegrityError:  # it was inserted between the two statements
            self._update_worker(values)

    def _update_worker(self, values: dict[str, Any]) -> bool:
        with self._write() as connection:
            return connection.execute(update(workers).where(workers.c.id == values["id"]).values(values)).rowcount == 1

    def live_workers(self, max_age_seconds: float) -> list[WorkerRecord]:
        """Workers seen within this many seconds."""
        since = self._now() - timedelta(seconds=max_age_seconds)
        query = select(workers).where(workers.c.last_seen_at >= since).order_by(workers.c.id)
        with self._read() as connection:
            return [rows.worker(row) for row in connection.execute(query)]

    def worker_gone(self, id: str) -> None:
        """Forgets a worker."""
        with self._write() as connection:
            connection.execute(delete(workers).where(workers.c.id == id))

    def job_counts(self) -> dict[JobState, int]:
        """How many jobs are in each state; every state is there."""
        with self._read() as connection:
            found = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)).all()
        counts = dict.fromkeys(JobState, 0)
        return counts | {JobState(state): count for state, count in found}

    def upload_counts(self) -> dict[tuple[UploadKind, UploadStatus], int]:
        """How many uploads there are of each kind and status."""
        query = select(uploads.c.kind, uploads.c.status, func.count()).group_by(uploads.c.kind, uploads.c.status)
        with self._read() as connection:
            return {(kind, UploadStatus(status)): count for kind, status, count in connection.execute(query)}

    def queue_depth(self) -> int:
        """How much work could start now if there were workers."""
        query = select(func.count()).select_from(work).where(work.c.state == QUEUED, ~waits_for_inspection())
        with self._read() as connection:
            return connection.execute(query).scalar_one()
