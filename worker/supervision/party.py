"""A job over several hosts, as the supervisors of its workers see to it.

The worker that claimed the job leads: it offers seats, waits until they are taken, and watches them. Before the
processes are connected, each supervisor carries the cards of its own ones to the database, and those of the others to
where its own can read them. A seat whose leader is gone ends by its lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from app.contract.errors import HostsMissing, Problem, RankLost, TersorError
from app.contract.queue import Doorbell
from app.contract.records import Claim, SeatRecord
from app.contract.spec import ResolvedSpec
from app.contract.store import JobStore
from worker.process import Stopped
from worker.scratch import CARDS, OTHERS, WORK
from worker.supervision.base import Trouble

log = logging.getLogger("tersor.supervise")

LOOK_SECONDS = 1.0  # how often a leader looks after the others
WAIT_SECONDS = 0.2
CAUSE_SECONDS = 5.0  # from a broken connection until its cause is told: a killed child, a limit, a lease
CARDS_EACH = 2  # gloo's and that of its lines, of every process
MAX_CARD_BYTES = 4096  # gloo's have some 200


class HostFailed(TersorError):
    """Another host's part in the job failed by itself; its problem is the job's."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self._problem = problem

    def problem(self) -> Problem:
        """What that host had to say."""
        return self._problem


@dataclass(frozen=True)
class Part:
    """Which host of which attempt."""

    job_id: str
    attempt: int
    host: int


class Party:
    """One host's part. `turn` is called again and again while its child runs."""

    def __init__(self, store: JobStore, part: Part, spec: ResolvedSpec, scratch: Path) -> None:
        self._store, self._part, self._spec = store, part, spec
        self._own, self._others = scratch / WORK / CARDS, scratch / OTHERS
        self._expected = CARDS_EACH * spec.processes
        self._laid: set[str] = set()
        self._taken: set[str] = set()
        self._met = False

    def turn(self) -> None:
        """Carries cards, until all processes have those of all others."""
        if len(self._laid) < self._expected:
            self._lay()
        if not self._met:
            self._take()

    def _lay(self) -> None:
        cards = [path for path in self._own.iterdir() if not path.name.startswith(".")]
        if len(cards) == len(self._laid):
            return
        found = {path.name: path.read_bytes()[:MAX_CARD_BYTES].hex() for path in cards}
        with _patience():
            self._store.lay_cards(self._part.job_id, self._part.attempt, self._part.host, found)
            self._laid = set(found)

    def _take(self) -> None:
        others = [seat for seat in self._seats() if seat.host != self._part.host]
        for name, card in ((name, card) for seat in others for name, card in seat.cards.items()):
            if name not in self._taken:
                unfinished = self._others / f".{name}"
                unfinished.write_bytes(bytes.fromhex(card))
                unfinished.rename(self._others / name)
                self._taken.add(name)
        self._met = len(self._taken) == self._expected * (self._spec.hosts - 1)

    def _seats(self) -> list[SeatRecord]:
        with _patience():
            return self._store.seats(self._part.job_id, self._part.attempt)
        return []


@contextmanager
def _patience() -> Iterator[None]:
    """A database that is away for a moment is asked again; while it is away for long, leases end."""
    try:
        yield
    except SQLAlchemyError as error:
        log.warning("the database does not answer: %s", error)


class Leader(Party):
    """The part of the worker that claimed the job."""

    def __init__(self, store: JobStore, claim: Claim, spec: ResolvedSpec, scratch: Path) -> None:
        super().__init__(store, Part(claim.work_id, claim.attempt, 0), spec, scratch)
        self._claim = claim
        self._looked_at = 0.0

    def gather(self, doorbell: Doorbell, patience: float, stop: Callable[[], bool]) -> None:
        """Returns once every seat is taken.

        Raises Stopped where `stop` says so, or where an older job waits for this worker too: two that wait for each
        other would wait for ever. Raises HostsMissing when the patience ends.
        """
        for id in self._store.open_seats(self._claim, self._spec.hosts):
            doorbell.ring(id)
        deadline = time.monotonic() + patience
        while True:
            found = self._seats()
            taken = 1 + sum(seat.taken for seat in found)
            self._heed(found)
            if taken >= self._spec.hosts:
                return
            if stop() or self._gives_way():
                raise Stopped
            if time.monotonic() > deadline:
                raise HostsMissing(
                    f"{taken} of {self._spec.hosts} workers took part after {patience:.0f} seconds. Ask for fewer "
                    "hosts, or submit it again when more workers are free.",
                    pointer=self._spec.training_pointer("hosts"),
                )
            time.sleep(WAIT_SECONDS)

    def turn(self) -> None:
        """Also looks after the others: raises what became of one that ended before its time."""
        super().turn()
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._heed(self._seats())

    def find_cause(self) -> None:
        """A connection broke: raises what another host says of it, if one does within some seconds."""
        deadline = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < deadline:
            self._heed(self._seats())
            time.sleep(WAIT_SECONDS)

    def _heed(self, found: list[SeatRecord]) -> None:
        for seat in found:
            if seat.gone:
                log.info("%s: host %d had to leave", self._claim.work_id, seat.host)
                raise Stopped
            if seat.lost:
                raise Trouble(RankLost(f"The worker of host {seat.host} of the training was lost.").problem())
            if seat.problem is not None:
                raise Trouble(seat.problem) if seat.problem.retryable else HostFailed(seat.problem)

    def _gives_way(self) -> bool:
        with _patience():
            older = self._store.next_work(["seat"], self._claim.owner)
            return older is not None and older[4:] < self._claim.work_id[4:]
        return False
