"""The rows of `work`: what can be claimed, and the condition that every write of an attempt must meet."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, insert, or_, select, update

from app.contract.errors import LeaseLost
from app.contract.records import Claim, WorkKind
from app.contract.states import UploadStatus
from app.contract.tables import job_models, jobs, seats, uploads, work

QUEUED, RUNNING, DONE = "queued", "running", "done"
SEAT: WorkKind = "seat"
LEADER = work.alias("leader")


def new_work(connection: Connection, id: str, kind: WorkKind, now: float, republish_seconds: float) -> None:
    """A queued piece of work. Who commits rings the doorbell; the sweep rings only if that did not help."""
    connection.execute(
        insert(work).values(
            id=id,
            kind=kind,
            state=QUEUED,
            attempt=0,
            tries=0,
            publish_at=now + republish_seconds,
            publish_delay=2 * republish_seconds,
        )
    )


def held(claim: Claim) -> ColumnElement[bool]:
    """The fence: this attempt is still the current one."""
    return and_(
        work.c.id == claim.work_id,
        work.c.state == RUNNING,
        work.c.owner == claim.owner,
        work.c.attempt == claim.attempt,
    )


def led(now: float) -> ColumnElement[bool]:
    """No seat, or one in an attempt that a worker is known to run: it ends with that."""
    return or_(work.c.kind != SEAT, exists().where(*_in_living_attempt(now)))


def _in_living_attempt(now: float) -> tuple[ColumnElement[bool], ...]:
    return (
        seats.c.id == work.c.id,
        LEADER.c.id == seats.c.job_id,
        LEADER.c.state == RUNNING,
        LEADER.c.attempt == seats.c.attempt,
        LEADER.c.lease_until >= now,
    )


def _open_to(owner: str, now: float) -> ColumnElement[bool]:
    """No seat, or one in a living attempt that this worker has no part in."""
    other, held = seats.alias("other"), work.alias("held")
    sits = exists().where(other.c.job_id == seats.c.job_id, held.c.id == other.c.id, held.c.owner == owner)
    free = exists().where(*_in_living_attempt(now), LEADER.c.owner != owner, ~sits.correlate(seats))
    return or_(work.c.kind != SEAT, free)


def drop_seats(connection: Connection, job_id: str) -> None:
    """An attempt at the job is over, and so is everybody's part in it."""
    own = select(seats.c.id).where(seats.c.job_id == job_id)
    connection.execute(delete(work).where(work.c.id.in_(own)))
    connection.execute(delete(seats).where(seats.c.job_id == job_id))


def end_work(connection: Connection, claim: Claim) -> None:
    """Marks the work as done; raises LeaseLost where the attempt is no longer the current one."""
    ended = connection.execute(update(work).where(held(claim)).values(state=DONE, owner=None, lease_until=None))
    if ended.rowcount != 1:
        raise LeaseLost()
    if claim.kind == "job":  # after the job's own row, which a claim locks first too
        drop_seats(connection, claim.work_id)


def claimable(owner: str, now: float) -> ColumnElement[bool]:
    """Nobody holds it, it does not wait for an inspection, and it is for this worker."""
    return and_(or_(work.c.state == QUEUED, orphaned(now)), ~waits_for_inspection(), _open_to(owner, now))


def orphaned(now: float) -> ColumnElement[bool]:
    """Its worker was lost. A seat is nobody's then: the attempt that it was a part of is over."""
    return and_(work.c.state == RUNNING, work.c.lease_until < now, work.c.kind != SEAT)


def waits_for_inspection() -> ColumnElement[bool]:
    """A job one of whose models, or whose dataset, is still being inspected."""
    inspecting = uploads.c.status == UploadStatus.INSPECTING
    own = exists().where(jobs.c.id == work.c.id, uploads.c.id.in_([jobs.c.model_id, jobs.c.dataset_id]), inspecting)
    named = exists().where(job_models.c.job_id == work.c.id, uploads.c.id == job_models.c.model_id, inspecting)
    return or_(own, named)
