"""Jobs over several hosts: the worker that claimed such a job offers seats, and others take them.

A seat is a piece of work that lives within one attempt at the job: it ends with that, and is never given to a second
worker, for whoever was in it has ended the attempt. The processes of all hosts find each other by cards that lie here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sqlalchemy import Connection, and_, insert, select, update

from app.contract.errors import LeaseLost, Problem
from app.contract.records import Claim, SeatRecord
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.store.leases import QUEUED, RUNNING, SEAT, drop_seats, end_work, held, new_work
from app.contract.tables import seats, work


class Seats(StoreBase):
    """The statements on `seats`."""

    def open_seats(self, claim: Claim, hosts: int) -> list[str]:
        """Offers the parts of all hosts but the first in this attempt at a job; what to ring for.

        Raises LeaseLost.
        """
        ids = [_seat_id(claim, host) for host in range(hosts)]
        with self._write() as connection:
            if connection.execute(select(work.c.id).where(held(claim)).with_for_update()).one_or_none() is None:
                raise LeaseLost()
            drop_seats(connection, claim.work_id)
            own = {"job_id": claim.work_id, "attempt": claim.attempt, "cards": "{}", "gone": False}
            connection.execute(insert(seats), [own | {"id": id, "host": host} for host, id in enumerate(ids)])
            for id in ids[1:]:
                new_work(connection, id, SEAT, self._clock(), self._republish_seconds)
        return ids[1:]

    def seat_of(self, claim: Claim) -> SeatRecord:
        """The claimed seat; raises LeaseLost where the attempt that it was a part of is over."""
        with self._read() as connection:
            row = connection.execute(select(seats).where(seats.c.id == claim.work_id)).one_or_none()
        if row is None:
            raise LeaseLost()
        return rows.seat(row, taken=True, lost=False)

    def seats(self, job_id: str, attempt: int) -> list[SeatRecord]:
        """All hosts' parts in an attempt, by host; none where it is over."""
        lost = and_(work.c.state == RUNNING, work.c.lease_until < self._clock())
        query = (
            select(seats, (work.c.state != QUEUED).label("taken"), lost.label("lost"))
            .outerjoin(work, work.c.id == seats.c.id)
            .where(seats.c.job_id == job_id, seats.c.attempt == attempt)
            .order_by(seats.c.host)
        )
        with self._read() as connection:
            found = connection.execute(query).all()
        return [rows.seat(row, bool(row.taken), bool(row.lost)) for row in found]

    def lay_cards(self, job_id: str, attempt: int, host: int, cards: Mapping[str, str]) -> None:
        """Notes what a host's processes tell the others. Nothing happens where the attempt is over."""
        own = (seats.c.job_id == job_id, seats.c.attempt == attempt, seats.c.host == host)
        with self._write() as connection:
            connection.execute(update(seats).where(*own).values(cards=json.dumps(dict(cards))))

    def leave_seat(self, claim: Claim) -> None:
        """The part is over, as it should be. Raises LeaseLost where the attempt was over before."""
        with self._write() as connection:
            end_work(connection, claim)


def end_seat(connection: Connection, claim: Claim, problem: Problem | None = None, gone: bool = False) -> None:
    """The part is over before its time; raises LeaseLost where the attempt was over before."""
    end_work(connection, claim)
    stored = None if problem is None else problem.model_dump_json()
    connection.execute(update(seats).where(seats.c.id == claim.work_id).values(problem=stored, gone=gone))


def _seat_id(claim: Claim, host: int) -> str:
    """Behind the kind's prefix as the job's own, so that it waits in the job's place."""
    return f"sit_{claim.work_id[4:]}{claim.attempt:x}-{host}"
