"""Jobs as their owner sees them: submit, look, cancel, and the report at the end."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, Select, bindparam, case, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.contract.errors import Conflict, IdempotencyKeyReused, NotFound
from app.contract.ids import new_id
from app.contract.records import ArtifactRecord, JobRecord
from app.contract.spec import JobSpec, ResolvedSpec
from app.contract.states import JobState
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.store.leases import DONE, QUEUED, new_work
from app.contract.tables import artifacts, idempotency, job_models, jobs, reports, work

# A key that is submitted twice at the same moment collides once; the second try finds the first one's job.
SUBMIT_TRIES = 3


def _select_jobs() -> Select[Any]:
    """Jobs with their place in the queue, which costs something only where the job is queued."""
    ahead = jobs.alias("ahead")
    place = (
        select(func.count() + 1)
        .select_from(ahead)
        .where(ahead.c.state == JobState.QUEUED, ahead.c.id < jobs.c.id)
        .correlate(jobs)
        .scalar_subquery()
    )
    return select(jobs, case((jobs.c.state == JobState.QUEUED, place)).label("queue_position"))


# Built once: to build a statement costs more than to run it, and these run at every poll.
JOBS = _select_jobs()
_MINE = (jobs.c.id == bindparam("id"), jobs.c.account == bindparam("account"))
_ONE_JOB = JOBS.where(*_MINE)
_ONE_VERSION = select(jobs.c.version).where(*_MINE)


class Jobs(StoreBase):
    """The statements on `jobs` that clients cause."""

    def add_job(
        self, account: str, spec: JobSpec, resolved: ResolvedSpec, idempotency_key: str | None, fingerprint: str | None
    ) -> tuple[JobRecord, bool]:
        """The job, and whether it is new.

        The same key with the same fingerprint gives the earlier job; raises IdempotencyKeyReused where the
        fingerprint differs.
        """
        for attempt in range(SUBMIT_TRIES):
            try:
                job_id, created = self._add_job(account, spec, resolved, idempotency_key, fingerprint)
                break
            except IntegrityError:
                if idempotency_key is None or attempt == SUBMIT_TRIES - 1:
                    raise
        return self.get_job(account, job_id), created

    def find_replay(self, account: str, idempotency_key: str, fingerprint: str | None) -> JobRecord | None:
        """The job that this key was used for before; raises IdempotencyKeyReused where the fingerprint differs."""
        with self._read() as connection:
            earlier = _earlier_job(connection, account, idempotency_key, fingerprint)
        return None if earlier is None else self.get_job(account, earlier)

    def _add_job(
        self, account: str, spec: JobSpec, resolved: ResolvedSpec, idempotency_key: str | None, fingerprint: str | None
    ) -> tuple[str, bool]:
        with self._write() as connection:
            if idempotency_key is not None:
                earlier = _earlier_job(connection, account, idempotency_key, fingerprint)
                if earlier is not None:
                    return earlier, False
            job_id = new_id("job")
            values = _new_job(job_id, account, spec, resolved)
            connection.execute(insert(jobs).values(values | {"created_at": self._now()}))
            if named := resolved.named_models():
                connection.execute(insert(job_models), [{"job_id": job_id, "model_id": id} for id in named])
            new_work(connection, job_id, "job", self._clock(), self._republish_seconds)
            if idempotency_key is not None:
                connection.execute(
                    insert(idempotency).values(
                        account=account,
                        idempotency_key=idempotency_key,
                        fingerprint=fingerprint,
                        job_id=job_id,
                        created_at=self._now(),
                    )
                )
            return job_id, True

    def get_job(self, account: str, id: str) -> JobRecord:
        """Raises NotFound, also where it belongs to another account."""
        with self._read() as connection:
            row = connection.execute(_ONE_JOB, {"id": id, "account": account}).one_or_none()
        if row is None:
            raise _no_such_job(id)
        return rows.job(row, self._now())

    def list_jobs(self, account: str, state: JobState | None, cursor_id: str | None, limit: int) -> list[JobRecord]:
        """Newest first; only ids below `cursor_id`."""
        query = JOBS.where(jobs.c.account == account)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if cursor_id is not None:
            query = query.where(jobs.c.id < cursor_id)
        with self._read() as connection:
            found = connection.execute(query.order_by(jobs.c.id.desc()).limit(limit)).all()
        return [rows.job(row, self._now()) for row in found]

    def job_version(self, account: str, id: str) -> int:
        """The job's version alone, for polling inside a request."""
        with self._read() as connection:
            version = connection.execute(_ONE_VERSION, {"id": id, "account": account}).scalar_one_or_none()
        if version is None:
            raise _no_such_job(id)
        return int(version)

    def request_cancel(self, account: str, id: str) -> JobRecord:
        """A queued job is cancelled at once; a running one when its worker sees the request.

        A job that is cancelled already comes back as it is; raises Conflict where it has succeeded or failed.
        """
        job = self.get_job(account, id)
        with self._write() as connection:
            _cancel(connection, id, self._now())
        job = self.get_job(account, id)
        if job.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise Conflict(f"The job has {job.state} already; only a queued or running job can be cancelled.")
        return job

    def report(self, account: str, id: str) -> dict[str, Any]:
        """The report of a job that succeeded; raises Conflict, naming the state, for any other."""
        with self._read() as connection:
            _require_success(connection, account, id)
            text = connection.execute(select(reports.c.report).where(reports.c.job_id == id)).scalar_one()
        report: dict[str, Any] = json.loads(text)
        return report

    def artifacts(self, account: str, id: str) -> list[ArtifactRecord]:
        """By name; raises Conflict, naming the state, unless the job succeeded."""
        with self._read() as connection:
            _require_success(connection, account, id)
            found = connection.execute(
                select(artifacts).where(artifacts.c.job_id == id).order_by(artifacts.c.name)
            ).all()
        return [rows.artifact(row) for row in found]

    def artifact(self, account: str, id: str, name: str) -> ArtifactRecord:
        """Raises NotFound for a name that the job did not deliver."""
        with self._read() as connection:
            _require_success(connection, account, id)
            row = connection.execute(
                select(artifacts).where(artifacts.c.job_id == id, artifacts.c.name == name)
            ).one_or_none()
        if row is None:
            raise NotFound(f"The job {id} has no artifact {name!r}; GET its /artifacts for the names.")
        return rows.artifact(row)


def _new_job(job_id: str, account: str, spec: JobSpec, resolved: ResolvedSpec) -> dict[str, Any]:
    return {
        "id": job_id,
        "account": account,
        "model_id": spec.model,
        "dataset_id": spec.dataset,
        "spec": spec.model_dump_json(),
        "resolved": resolved.model_dump_json(),
        "state": JobState.QUEUED,
        "progress": 0.0,
        "attempt": 0,
        "cancel_requested": False,
        "warnings": "[]",
        "version": 1,
    }


def _earlier_job(connection: Connection, account: str, key: str, fingerprint: str | None) -> str | None:
    row = connection.execute(
        select(idempotency.c.job_id, idempotency.c.fingerprint).where(
            idempotency.c.account == account, idempotency.c.idempotency_key == key
        )
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise IdempotencyKeyReused()
    return str(row.job_id)


def _cancel(connection: Connection, job_id: str, now: Any) -> None:
    """Work first, job second: the same order as a claim, so that the two cannot wait for each other."""
    dequeued = connection.execute(
        update(work).where(work.c.id == job_id, work.c.state == QUEUED).values(state=DONE, owner=None)
    )
    change: dict[str, Any] = {"cancel_requested": True, "version": jobs.c.version + 1}
    asking = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING]))
    if dequeued.rowcount:
        change |= {"state": JobState.CANCELLED, "finished_at": now}
    else:
        asking = asking.where(jobs.c.cancel_requested.is_(False))  # asking twice changes nothing
    connection.execute(asking.values(change))


def _require_success(connection: Connection, account: str, job_id: str) -> None:
    state = connection.execute(
        select(jobs.c.state).where(jobs.c.id == job_id, jobs.c.account == account)
    ).scalar_one_or_none()
    if state is None:
        raise _no_such_job(job_id)
    if state != JobState.SUCCEEDED:
        raise Conflict(f"The job is {state}: only a job that has succeeded has a report and artifacts.")


def _no_such_job(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id}, or it belongs to another account.")
