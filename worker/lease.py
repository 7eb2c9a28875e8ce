"""Keeps a claim alive from a thread of its own, so that neither a long copy nor a busy child can cost the lease."""

from __future__ import annotations

import logging
import threading
import time
from typing import Literal, Self

from app.contract.errors import LeaseLost
from app.contract.records import Claim
from app.contract.store import JobStore

log = logging.getLogger("tersor.lease")

# How often the wish to cancel is looked for, and how often progress is written at most.
POLL_SECONDS = 0.4
PROGRESS_SECONDS = 0.25
BEATS_PER_LEASE = 3  # two may fail before the lease is lost

Verdict = Literal["cancelled", "lost"]


class LeaseKeeper:
    """A claim that is kept alive while the context lasts. `verdict` says why the work is to stop, if it is."""

    def __init__(self, store: JobStore, claim: Claim, lease_seconds: float) -> None:
        self._store, self._claim, self._lease = store, claim, lease_seconds
        self._wake = threading.Condition()
        self._progress: float | None = None
        self._step: str | None = None
        self._unwritten = self._urgent = self._closing = False
        self._beat_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"lease-{claim.work_id}", daemon=True)
        self.verdict: Verdict | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def note(self, progress: float, step: str) -> None:
        """Progress to be written with the next beat; a new step is written at once."""
        with self._wake:
            self._progress, self._unwritten = progress, True
            if step != self._step:
                self._step, self._urgent = step, True
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._urgent and not self._closing:
                    self._wake.wait(PROGRESS_SECONDS if self._unwritten else POLL_SECONDS)
                if self._closing or self.verdict == "lost":
                    return
            self._tick()

    def _tick(self) -> None:
        try:
            cancelled = self._beat() if self._beat_is_due() else self._store.cancel_requested(self._claim)
        except LeaseLost:
            self.verdict = "lost"
        except Exception as error:  # not the database's errors alone: without this thread the lease is lost unnoticed
            log.warning("the database does not answer: %s: %s", type(error).__name__, error)
            if time.monotonic() - self._beat_at > self._lease:
                self.verdict = "lost"  # another worker may hold the work by now
        else:
            if cancelled:
                self.verdict = "cancelled"

    def _beat_is_due(self) -> bool:
        return self._unwritten or time.monotonic() - self._beat_at > self._lease / BEATS_PER_LEASE

    def _beat(self) -> bool:
        with self._wake:
            progress, step = (self._progress, self._step) if self._unwritten else (None, None)
            self._unwritten = self._urgent = False
        started = time.monotonic()
        cancelled = self._store.heartbeat(self._claim, self._lease, progress, step)
        self._beat_at = started
        return cancelled
