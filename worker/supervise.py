"""Runs one claimed piece of work in a child process and writes down what came of it."""

from __future__ import annotations

import logging

from sqlalchemy.exc import SQLAlchemyError

from app.contract.errors import (
    LeaseLost,
    Problem,
    WorkerLost,
)
from app.contract.records import Claim
from worker.checkpoints.keeper import remove_checkpoints
from worker.lease import LeaseKeeper
from worker.process import Stopped
from worker.scratch import scratch_folder
from worker.supervision.base import Entries, Trouble
from worker.supervision.inspections import Inspections
from worker.supervision.jobs import Jobs

__all__ = ["Entries", "Supervisor"]

log = logging.getLogger("tersor.supervise")


class Supervisor(Jobs, Inspections):
    """Runs attempts. One object serves every thread of a worker; `stopping` ends all of them."""

    def run(self, claim: Claim) -> None:
        """One attempt, from the claim to the verdict. Raises nothing: what goes wrong is written down or logged."""
        log.info("%s: attempt %d", claim.work_id, claim.attempt)
        attempt = {"job": self._run_job, "seat": self._run_seat}.get(claim.kind, self._run_inspection)
        try:
            with LeaseKeeper(self._store, claim, self._settings.lease_seconds) as keeper:
                try:
                    with scratch_folder(self._settings.scratch, claim) as scratch:
                        attempt(claim, keeper, scratch)
                except Stopped:
                    self._stop(claim, keeper)
        except LeaseLost:
            log.warning("%s: attempt %d lost its lease", claim.work_id, claim.attempt)
        except Trouble as trouble:
            log.warning("%s: attempt %d goes back: %s", claim.work_id, claim.attempt, trouble)
            self._retry(claim, trouble.problem)
        except Exception as error:
            log.exception("%s: attempt %d could not be supervised", claim.work_id, claim.attempt)
            self._retry(claim, WorkerLost(f"The worker failed ({type(error).__name__}). Submit it again.").problem())

    def _retry(self, claim: Claim, problem: Problem) -> None:
        try:
            self._store.retry(claim, problem)
        except LeaseLost:
            log.warning("%s: attempt %d had ended already", claim.work_id, claim.attempt)
        except SQLAlchemyError as error:
            log.warning("the database does not answer; %s waits for its lease to end: %s", claim.work_id, error)

    def _stop(self, claim: Claim, keeper: LeaseKeeper) -> None:
        """Nothing of the attempt runs any more, and its scratch folder is gone."""
        if keeper.verdict == "lost":
            raise LeaseLost()
        if keeper.verdict == "cancelled":
            self._insist(keeper, lambda: self._store.cancel_job(claim))
            remove_checkpoints(self._blobs, claim.work_id)
        else:
            self._store.release(claim)
