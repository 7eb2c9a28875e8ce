"""How much a worker does at once, and what it does next.

Jobs and inspections have slots of their own, so that no upload waits behind an hour of training. A slot that is done
asks the database for the next piece of work itself; the doorbell only wakes slots that sleep.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from app.contract.records import Claim, WorkKind
from app.contract.store import JobStore

log = logging.getLogger("tersor.dispatcher")

# An inspection takes seconds and little memory.
INSPECTIONS = 1
KINDS: Mapping[str, WorkKind] = {"job_": "job", "sit_": "seat", "mdl_": "model", "dst_": "dataset"}  # by the id


class Dispatcher:
    """Starts threads that claim and run work."""

    def __init__(
        self,
        store: JobStore,
        run: Callable[[Claim], None],
        owner: str,
        lease_seconds: float,
        concurrency: int,
        seats: bool = False,
    ) -> None:
        """`seats`: whether it takes part in jobs over several hosts that another worker leads."""
        self._store, self._run, self._owner, self._lease = store, run, owner, lease_seconds
        self._lanes = (
            _Lane(("job", "seat") if seats else ("job",), concurrency),
            _Lane(("model", "dataset"), INSPECTIONS),
        )
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._stopping = False

    def wake(self, work_id: str) -> None:
        """The doorbell rang for this work: a free slot takes it now, else the next one to be free."""
        lane = next((lane for lane in self._lanes if KINDS.get(work_id[:4]) in lane.kinds), None)
        if lane is not None:
            self._start(lane, work_id)

    def look(self) -> None:
        """Takes what waits in the database where a slot is free: for messages that went to a busy worker or nowhere."""
        for lane in self._lanes:
            if lane.running < lane.slots and (waiting := self._store.next_work(lane.kinds, self._owner)) is not None:
                self._start(lane, waiting)

    def refuse(self) -> None:
        """Takes no more work."""
        with self._lock:
            self._stopping = True

    def join(self, seconds: float) -> None:
        """Returns when what runs has ended, or after this long."""
        deadline = time.monotonic() + seconds
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, lane: _Lane, work_id: str) -> None:
        with self._lock:
            if self._stopping:
                return
            if lane.running >= lane.slots:
                lane.missed = True
                return
            lane.running += 1
            thread = threading.Thread(target=self._drain, args=(lane, work_id), name=f"work-{work_id}", daemon=True)
            self._threads.add(thread)
            thread.start()  # under the lock: whoever joins finds none that has not begun

    def _drain(self, lane: _Lane, work_id: str | None) -> None:
        """Runs the work and whatever waits after it, until nothing does."""
        try:
            while not self._leaves(lane, work_id):
                if work_id is not None and (claim := self._store.claim(work_id, self._owner, self._lease)) is not None:
                    self._run(claim)
                work_id = self._store.next_work(lane.kinds, self._owner)
        except Exception:
            log.exception("a slot gave up; the next look fills it again")
            with self._lock:
                self._free(lane)

    def _leaves(self, lane: _Lane, work_id: str | None) -> bool:
        with self._lock:
            missed, lane.missed = lane.missed, False
            if not self._stopping and (work_id is not None or missed):
                return False
            self._free(lane)
            return True

    def _free(self, lane: _Lane) -> None:
        lane.running -= 1
        self._threads.discard(threading.current_thread())


class _Lane:
    """Slots for some kinds of work. `missed`: the bell rang while all were taken."""

    def __init__(self, kinds: Sequence[WorkKind], slots: int) -> None:
        self.kinds, self.slots = kinds, slots
        self.running = 0
        self.missed = False
