"""Work as workers see it: claim, keep the lease, finish. Every write is fenced by (owner, attempt)."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, case, func, insert, or_, select, update

from app.contract.errors import LeaseLost, Problem, WorkerLost
from app.contract.records import ArtifactRecord, Claim, JobRecord, UploadRecord, WorkKind
from app.contract.states import JobState
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.store.jobs import JOBS
from app.contract.store.leases import (
    DONE,
    QUEUED,
    RUNNING,
    SEAT,
    claimable,
    drop_seats,
    end_work,
    held,
    led,
    orphaned,
    waits_for_inspection,
)
from app.contract.store.seats import end_seat
from app.contract.store.uploads import reject
from app.contract.tables import artifacts, job_models, jobs, reports, uploads, work

# A job that waits long behind others gets a message this often; a message that is not needed costs one statement.
MAX_REPUBLISH_SECONDS = 300.0
LIVE = (JobState.QUEUED, JobState.RUNNING)


class Work(StoreBase):
    """The statements on `work`, and on jobs on behalf of the attempt that runs them."""

    def claim(self, work_id: str, owner: str, lease_seconds: float) -> Claim | None:
        """Takes the work; None where somebody holds it, it is done, or its inputs are still being inspected.

        A job whose workers were lost too often fails here, and one whose cancelling worker was lost is cancelled.
        """
        with self._write() as connection:
            row = connection.execute(
                update(work)
                .where(work.c.id == work_id, claimable(owner, self._clock()))
                .values(
                    state=RUNNING,
                    attempt=work.c.attempt + 1,
                    tries=work.c.tries + 1,
                    owner=owner,
                    lease_until=self._clock() + lease_seconds,
                    publish_at=self._clock(),
                    publish_delay=self._republish_seconds,
                )
                .returning(work.c.kind, work.c.attempt, work.c.tries)
            ).one_or_none()
            if row is None:
                return None
            claim = Claim(work_id, row.kind, row.attempt, owner)
            if row.kind == SEAT:
                return claim
            if row.kind != "job":
                return self._started_inspection(connection, claim, row.tries)
            return self._started_job(connection, claim, row.tries)

    def _started_inspection(self, connection: Connection, claim: Claim, tries: int) -> Claim | None:
        if tries <= self._max_attempts:
            return claim
        end_work(connection, claim)
        reject(connection, claim.work_id, _lost("inspected this file", self._max_attempts), self._now())
        return None

    def _started_job(self, connection: Connection, claim: Claim, tries: int) -> Claim | None:
        drop_seats(connection, claim.work_id)
        # Locked, so that nobody ends the job between this look and the update.
        live = select(jobs.c.cancel_requested).where(jobs.c.id == claim.work_id, jobs.c.state.in_(LIVE))
        cancelled = connection.execute(live.with_for_update()).scalar_one_or_none()
        if cancelled is None:  # it has ended already
            end_work(connection, claim)
            return None
        if cancelled or tries > self._max_attempts:
            end_work(connection, claim)
            lost = None if cancelled else _lost("ran this job", self._max_attempts)
            _end_job(connection, claim.work_id, self._now(), JobState.FAILED, error=lost and lost.model_dump_json())
            return None
        now = self._now()
        connection.execute(
            update(jobs)
            .where(jobs.c.id == claim.work_id)
            .values(
                state=JobState.RUNNING,
                attempt=claim.attempt,
                attempt_started_at=now,
                started_at=case((jobs.c.started_at.is_(None), now), else_=jobs.c.started_at),
                progress=0.0,
                step=None,
                version=jobs.c.version + 1,
            )
        )
        return claim

    def heartbeat(
        self, claim: Claim, lease_seconds: float, progress: float | None = None, step: str | None = None
    ) -> bool:
        """Extends the lease and notes how far the job is; True where its owner asked to cancel it.

        Raises LeaseLost where the attempt is no longer the current one. Progress only ever grows within an attempt.
        """
        with self._write() as connection:
            extended = connection.execute(
                update(work).where(held(claim), led(self._clock())).values(lease_until=self._clock() + lease_seconds)
            )
            if extended.rowcount != 1:
                raise LeaseLost()
            if claim.kind == "job" and (progress is not None or step is not None):
                _note_progress(connection, claim.work_id, progress, step)
            return _cancel_requested(connection, claim)

    def cancel_requested(self, claim: Claim) -> bool:
        """Whether the job's owner asked to cancel it: one read, for looking often. Raises LeaseLost as a heartbeat."""
        with self._read() as connection:
            current = select(work.c.id).where(held(claim), led(self._clock()))
            if connection.execute(current).one_or_none() is None:
                raise LeaseLost()
            return _cancel_requested(connection, claim)

    def finish_job(
        self,
        claim: Claim,
        report: dict[str, Any],
        artifact_records: Sequence[ArtifactRecord],
        warnings: Sequence[str],
        goal_met: bool | None,
    ) -> JobState:
        """Publishes the result; gives `cancelled`, and publishes nothing, where the owner asked for that before."""
        with self._write() as connection:
            end_work(connection, claim)
            state = _end_job(
                connection,
                claim.work_id,
                self._now(),
                JobState.SUCCEEDED,
                progress=1.0,
                warnings=json.dumps(list(warnings)),
                goal_met=goal_met,
            )
            if state is JobState.SUCCEEDED:
                connection.execute(insert(reports).values(job_id=claim.work_id, report=json.dumps(report)))
                if artifact_records:
                    connection.execute(insert(artifacts), [_artifact_values(record) for record in artifact_records])
            return state

    def has_delivered(self, claim: Claim) -> bool:
        """Whether this very attempt has finished the job with success."""
        query = select(jobs.c.id).where(
            jobs.c.id == claim.work_id, jobs.c.attempt == claim.attempt, jobs.c.state == JobState.SUCCEEDED
        )
        with self._read() as connection:
            return connection.execute(query).one_or_none() is not None

    def fail_job(self, claim: Claim, problem: Problem) -> JobState:
        """Ends the job with the problem; gives `cancelled` instead where its owner asked for that before."""
        with self._write() as connection:
            end_work(connection, claim)
            return _end_job(connection, claim.work_id, self._now(), JobState.FAILED, error=problem.model_dump_json())

    def cancel_job(self, claim: Claim) -> None:
        """Ends the job as its owner asked."""
        with self._write() as connection:
            end_work(connection, claim)
            _end_job(connection, claim.work_id, self._now(), JobState.CANCELLED)

    def release(self, claim: Claim) -> None:
        """Gives the work back to the queue, as if this attempt had not been; its number is not used again.

        A job whose owner asked to cancel it ends as cancelled instead. A seat ends: the leader gives back the job.
        """
        with self._write() as connection:
            if claim.kind == SEAT:
                return end_seat(connection, claim, gone=True)
            self._requeue(connection, claim, counted=False)

    def retry(self, claim: Claim, problem: Problem) -> None:
        """Gives the work back to the queue after an attempt that counts; the last one ends it with the problem.

        A seat ends with it at once: the leader takes it for the job's.
        """
        with self._write() as connection:
            if claim.kind == SEAT:
                return end_seat(connection, claim, problem=problem)
            if self._requeue(connection, claim, counted=True) < self._max_attempts:
                return
            ended = update(work).where(work.c.id == claim.work_id, work.c.state == QUEUED).values(state=DONE)
            if connection.execute(ended).rowcount != 1:
                return  # cancelled
            if claim.kind == "job":
                error = problem.model_dump_json()
                _end_job(connection, claim.work_id, self._now(), JobState.FAILED, error=error)
            else:
                reject(connection, claim.work_id, problem, self._now())

    def _requeue(self, connection: Connection, claim: Claim, *, counted: bool) -> int:
        """Puts the work back, or ends it where it is to be cancelled; how many tries it has had."""
        tries = connection.execute(
            update(work)
            .where(held(claim))
            .values(
                state=QUEUED,
                tries=work.c.tries if counted else work.c.tries - 1,
                owner=None,
                lease_until=None,
                publish_at=self._clock(),
                publish_delay=self._republish_seconds,
            )
            .returning(work.c.tries)
        ).scalar_one_or_none()
        if tries is None:
            raise LeaseLost()
        if claim.kind == "job":
            drop_seats(connection, claim.work_id)
            queued = connection.execute(
                update(jobs)
                .where(jobs.c.id == claim.work_id, jobs.c.cancel_requested.is_(False))
                .values(state=JobState.QUEUED, progress=0.0, step=None, version=jobs.c.version + 1)
            )
            if queued.rowcount != 1:
                connection.execute(update(work).where(work.c.id == claim.work_id).values(state=DONE))
                _end_job(connection, claim.work_id, self._now(), JobState.CANCELLED)
        return int(tries)

    def job_inputs(self, job_id: str) -> tuple[JobRecord, UploadRecord, UploadRecord | None]:
        """A job with its model and its dataset."""
        with self._read() as connection:
            job = connection.execute(JOBS.where(jobs.c.id == job_id)).one()
            wanted = [id for id in (job.model_id, job.dataset_id) if id is not None]
            found = connection.execute(select(uploads).where(uploads.c.id.in_(wanted))).all()
        by_id = {row.id: rows.upload(row) for row in found}
        dataset = None if job.dataset_id is None else by_id[job.dataset_id]
        return rows.job(job, self._now()), by_id[job.model_id], dataset

    def named_models(self, job_id: str) -> list[UploadRecord]:
        """The models that a job names besides its own."""
        named = select(job_models.c.model_id).where(job_models.c.job_id == job_id)
        with self._read() as connection:
            found = connection.execute(select(uploads).where(uploads.c.id.in_(named)).order_by(uploads.c.id)).all()
        return [rows.upload(row) for row in found]

    def upload_for(self, claim: Claim) -> UploadRecord:
        """The claimed upload."""
        with self._read() as connection:
            return rows.upload(connection.execute(select(uploads).where(uploads.c.id == claim.work_id)).one())

    def next_work(self, kinds: Sequence[WorkKind], owner: str = "") -> str | None:
        """The oldest work of these kinds that this worker's claim would get now. A seat is as old as its job."""
        age = func.substr(work.c.id, 5)  # behind the kind's prefix, ids sort by the time of creation
        query = select(work.c.id).where(work.c.kind.in_(kinds), claimable(owner, self._clock())).order_by(age).limit(1)
        with self._read() as connection:
            return connection.execute(query).scalar_one_or_none()

    def ended(self, ids: Collection[str]) -> set[str]:
        """Those of these pieces of work that no attempt will be made at any more."""
        alive = select(work.c.id).where(work.c.id.in_(ids), work.c.state != DONE)
        with self._read() as connection:
            return set(ids) - set(connection.execute(alive).scalars())

    def due(self, now: datetime, limit: int) -> list[str]:
        """Work to publish again: queued and not heard of, or held by a worker whose lease ran out.

        The same statement moves each one's next time forward, doubling the wait, so that any number of sweepers
        publish it once.
        """
        moment = now.timestamp()
        waiting = or_(and_(work.c.state == QUEUED, led(moment)), orphaned(moment))
        wanted = and_(work.c.publish_at <= moment, waiting, ~waits_for_inspection())
        picked = (
            select(work.c.id).where(wanted).order_by(work.c.publish_at).limit(limit).with_for_update(skip_locked=True)
        )
        longer = 2 * work.c.publish_delay
        with self._write() as connection:
            found = connection.execute(
                update(work)
                .where(work.c.id.in_(picked), work.c.publish_at <= moment)
                .values(
                    publish_at=moment + work.c.publish_delay,
                    publish_delay=case((longer < MAX_REPUBLISH_SECONDS, longer), else_=MAX_REPUBLISH_SECONDS),
                )
                .returning(work.c.id)
            )
            return sorted(found.scalars())


def _lost(what: str, times: int) -> Problem:
    return WorkerLost(f"The workers that {what} were lost {times} times. Submit it again.").problem()


def _cancel_requested(connection: Connection, claim: Claim) -> bool:
    if claim.kind != "job":
        return False
    return bool(connection.execute(select(jobs.c.cancel_requested).where(jobs.c.id == claim.work_id)).scalar_one())


def _note_progress(connection: Connection, job_id: str, progress: float | None, step: str | None) -> None:
    change: dict[str, Any] = {"version": jobs.c.version + 1}
    if progress is not None:
        change["progress"] = case((jobs.c.progress < progress, progress), else_=jobs.c.progress)
    if step is not None:
        change["step"] = step
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(change))


def _end_job(connection: Connection, job_id: str, now: datetime, state: JobState, **change: Any) -> JobState:
    """Ends a job whose work has just ended; a request to cancel wins over every other end."""
    cancelled = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(step=None, finished_at=now, version=jobs.c.version + 1)
        .returning(jobs.c.cancel_requested)
    ).scalar_one()
    if cancelled:
        state, change = JobState.CANCELLED, {}
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(state=state, **change))
    return state


def _artifact_values(record: ArtifactRecord) -> dict[str, Any]:
    return {
        "job_id": record.job_id,
        "name": record.name,
        "format": record.format,
        "size_bytes": record.size_bytes,
        "sha256": record.sha256,
        "media_type": record.media_type,
        "blob_key": record.key,
    }
