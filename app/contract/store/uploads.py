"""Models and datasets: their records, and the verdict of the inspection."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, bindparam, insert, or_, select, update

from app.contract.errors import (
    BlobMissing,
    DatasetRejected,
    ModelRejected,
    NotFound,
    Problem,
    TersorError,
    WorkerLost,
)
from app.contract.facts import DatasetFacts, ModelFacts
from app.contract.records import Claim, UploadKind, UploadRecord
from app.contract.states import JobState, UploadStatus
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.store.leases import DONE, QUEUED, end_work, new_work
from app.contract.tables import job_models, jobs, resumable_uploads, uploads, work


class Uploads(StoreBase):
    """The statements on `uploads`."""

    def add_upload(
        self,
        account: str,
        kind: UploadKind,
        id: str,
        filename: str,
        sha256: str,
        size_bytes: int,
        spec: dict[str, Any],
        present: Callable[[], bool] | None = None,
    ) -> UploadRecord:
        """Records an upload whose bytes are stored, together with the work to inspect it.

        `present` says whether they are still there, and is asked where nobody can delete them any more before they are
        in use; then this raises BlobMissing where they are not.
        """
        record = UploadRecord(
            id, account, kind, filename, sha256, size_bytes, spec, UploadStatus.INSPECTING, None, None, self._now()
        )
        values = {
            "id": id,
            "account": account,
            "kind": kind,
            "filename": filename,
            "sha256": sha256,
            "size_bytes": size_bytes,
            "spec": json.dumps(spec),
            "status": UploadStatus.INSPECTING,
            "created_at": record.created_at,
        }
        with self._write() as connection:
            self._lock(connection, sha256)
            if present is not None and not present():
                raise BlobMissing()
            connection.execute(insert(uploads).values(values))
            new_work(connection, id, kind, self._clock(), self._republish_seconds)
        return record

    def get_upload(self, account: str, id: str) -> UploadRecord:
        """Raises NotFound, also where it belongs to another account."""
        with self._read() as connection:
            row = connection.execute(
                select(uploads).where(uploads.c.id == id, uploads.c.account == account)
            ).one_or_none()
        if row is None:
            raise NotFound(f"There is no upload {id}, or it belongs to another account.")
        return rows.upload(row)

    def list_uploads(
        self, account: str, kind: UploadKind, cursor_id: str | None, limit: int, status: UploadStatus | None = None
    ) -> list[UploadRecord]:
        """Newest first; only ids below `cursor_id`."""
        query = select(uploads).where(uploads.c.account == account, uploads.c.kind == kind)
        if cursor_id is not None:
            query = query.where(uploads.c.id < cursor_id)
        if status is not None:
            query = query.where(uploads.c.status == status)
        with self._read() as connection:
            found = connection.execute(query.order_by(uploads.c.id.desc()).limit(limit)).all()
        return [rows.upload(row) for row in found]

    def finish_inspection(self, claim: Claim, verdict: ModelFacts | DatasetFacts | Problem) -> list[str]:
        """Writes the verdict; raises LeaseLost for an attempt that is no longer the current one.

        Gives the queued jobs that waited for this upload, due to be published now. Where the upload is rejected they
        fail with its problem instead, and none is given.
        """
        with self._write() as connection:
            end_work(connection, claim)
            if isinstance(verdict, Problem):
                reject(connection, claim.work_id, verdict, self._now())
                return []
            connection.execute(
                update(uploads)
                .where(uploads.c.id == claim.work_id)
                .values(status=UploadStatus.READY, facts=verdict.model_dump_json(), problem=None)
            )
            waiting = _waiting_jobs(claim.work_id)
            connection.execute(
                update(work)
                .where(work.c.id.in_(waiting), work.c.state == QUEUED)
                .values(publish_at=self._clock(), publish_delay=self._republish_seconds)
            )
            return list(connection.execute(waiting.order_by(jobs.c.id)).scalars())

    def release_blob(self, sha256: str, delete: Callable[[], None]) -> None:
        """Deletes bytes unless they are in use; nobody can begin to use them meanwhile."""
        with self._write() as connection:
            self._lock(connection, sha256)
            if not is_in_use(connection, sha256):
                delete()

    def holds_blob(self, account: str, sha256: str) -> bool:
        """Whether this account has uploaded these bytes itself, and they are kept for it."""
        recorded = select(uploads.c.id).where(
            uploads.c.account == account, uploads.c.sha256 == sha256, uploads.c.status != UploadStatus.REJECTED
        )
        resumed = select(resumable_uploads.c.id).where(
            resumable_uploads.c.account == account,
            resumable_uploads.c.sha256 == sha256,
            resumable_uploads.c.finished,
            resumable_uploads.c.expires_at > self._now(),
        )
        with self._read() as connection:
            return bool(connection.execute(select(or_(recorded.exists(), resumed.exists()))).scalar_one())


def is_in_use(connection: Connection, sha256: str) -> bool:
    """Whether anything that is not rejected refers to these bytes."""
    recorded = select(uploads.c.id).where(uploads.c.sha256 == sha256, uploads.c.status != UploadStatus.REJECTED)
    resumed = select(resumable_uploads.c.id).where(resumable_uploads.c.sha256 == sha256)
    return bool(connection.execute(select(or_(recorded.exists(), resumed.exists()))).scalar_one())


def reject(connection: Connection, upload_id: str, problem: Problem, now: datetime) -> None:
    """Marks an upload as rejected and fails the queued jobs that name it."""
    kind = connection.execute(
        update(uploads)
        .where(uploads.c.id == upload_id)
        .values(status=UploadStatus.REJECTED, problem=problem.model_dump_json(), facts=None)
        .returning(uploads.c.kind)
    ).scalar_one()
    # Collected once: a job that is submitted between two statements is failed by both or by neither.
    dequeued = connection.execute(
        update(work)
        .where(work.c.id.in_(_waiting_jobs(upload_id)), work.c.state == QUEUED)
        .values(state=DONE)
        .returning(work.c.id)
    ).scalars()
    ids = [{"job_id": id} for id in dequeued]
    if not ids:
        return
    failing = update(jobs).where(jobs.c.id == bindparam("job_id"), jobs.c.state == JobState.QUEUED)
    own = or_(jobs.c.model_id == upload_id, jobs.c.dataset_id == upload_id)
    # Those that are left after the jobs whose own model or data it is name it in a step, as a teacher or a student.
    for statement, pointer in ((failing.where(own), f"/{kind}"), (failing, "/steps")):
        cause = rejection(kind, upload_id, problem, pointer).problem().model_dump_json()
        ended = statement.values(state=JobState.FAILED, error=cause, finished_at=now, version=jobs.c.version + 1)
        connection.execute(ended, ids)


def rejection(kind: UploadKind, upload_id: str, problem: Problem | None, pointer: str | None = None) -> TersorError:
    """Why a job that names this rejected upload fails; retryable where the upload's problem is."""
    detail = "no reason was kept" if problem is None else problem.detail
    rejected: type[TersorError] = ModelRejected if kind == "model" else DatasetRejected
    if problem is not None and problem.retryable:
        rejected = WorkerLost
    return rejected(f"The {kind} {upload_id} was rejected: {detail}", pointer=pointer or f"/{kind}")


def _waiting_jobs(upload_id: str) -> Select[str]:
    named = select(job_models.c.job_id).where(job_models.c.model_id == upload_id)
    return select(jobs.c.id).where(
        or_(jobs.c.model_id == upload_id, jobs.c.dataset_id == upload_id, jobs.c.id.in_(named)),
        jobs.c.state == JobState.QUEUED,
    )
