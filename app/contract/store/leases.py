"""The rows of `work`: what can be claimed, and the condition that every write of an attempt must meet."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, and_, exists, insert, or_, update

from app.contract.errors import LeaseLost
from app.contract.records import Claim, WorkKind
from app.contract.states import UploadStatus
from app.contract.tables import job_models, jobs, uploads, work

QUEUED, RUNNING, DONE = "queued", "running", "done"


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


def end_work(connection: Connection, claim: Claim) -> None:
    """Marks the work as done; raises LeaseLost where the attempt is no longer the current one."""
    ended = connection.execute(update(work).where(held(claim)).values(state=DONE, owner=None, lease_until=None))
    if ended.rowcount != 1:
        raise LeaseLost()


def claimable(now: float) -> ColumnElement[bool]:
    """Nobody holds it, and it does not wait for an inspection."""
    free = or_(work.c.state == QUEUED, and_(work.c.state == RUNNING, work.c.lease_until < now))
    return and_(free, ~waits_for_inspection())


def waits_for_inspection() -> ColumnElement[bool]:
    """A job one of whose models, or whose dataset, is still being inspected."""
    inspecting = uploads.c.status == UploadStatus.INSPECTING
    own = exists().where(jobs.c.id == work.c.id, uploads.c.id.in_([jobs.c.model_id, jobs.c.dataset_id]), inspecting)
    named = exists().where(job_models.c.job_id == work.c.id, uploads.c.id == job_models.c.model_id, inspecting)
    return or_(own, named)
