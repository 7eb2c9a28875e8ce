"""Stores the checkpoints that a child announces, and finds them for the next attempt. Trusts none of what they hold."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path
from typing import Self

from obstore.exceptions import BaseError as StoreError

from app.contract.blobs import Blobs, checkpoint_key, checkpoint_prefix
from app.contract.errors import BlobMissing
from app.contract.records import Claim
from app.contract.store import JobStore
from worker.messages import CheckpointWritten
from worker.scratch import WORK, remove

log = logging.getLogger("tersor.checkpoints")

KINDS = ("step", "training")  # in this order: the second is worth nothing without the first
LEAVE_SECONDS = 1.0  # to end what is being stored when the child is gone; a job that is cancelled ends within seconds


class CheckpointKeeper:
    """Stores in a thread of its own while the context lasts: a slow store holds up neither the child nor its limits.

    Of each kind the newest is kept, and older ones of this and of earlier attempts are removed. A checkpoint that
    cannot be stored is let go: the next one may be.
    """

    def __init__(self, blobs: Blobs, claim: Claim, attempt: Path, seconds: float) -> None:
        self._blobs, self._claim, self._attempt, self._seconds = blobs, claim, attempt, seconds
        self._wake = threading.Condition()
        self._offered: dict[str, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"checkpoints-{claim.work_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._wake:
            self._closing.set()
            self._wake.notify()
        self._thread.join(LEAVE_SECONDS)

    def offer(self, written: CheckpointWritten) -> None:
        """To be stored in its turn, unless a newer one of its kind comes before that."""
        with self._wake:
            self._offered[written.of] = written.name
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._offered or self._closing.is_set())
                if self._closing.is_set():
                    return
                offered, self._offered = self._offered, {}
            for kind in KINDS:
                if kind in offered:
                    self._store(kind, offered[kind])
            # A child that goes mad does not make the store do the same.
            self._closing.wait(self._seconds / 2)

    def _store(self, kind: str, name: str) -> None:
        """Moves the file to where the child cannot reach it, and stores it from there."""
        taken = self._attempt / f"taken-{name}"
        try:
            os.rename(self._attempt / WORK / name, taken)
            if not _is_a_file_of_its_own(taken):
                log.warning("%s: what was announced as a checkpoint is none", self._claim.work_id)
                return
            self._blobs.put_file(taken, checkpoint_key(self._claim.work_id, self._claim.attempt, kind))
            for attempt in range(1, self._claim.attempt):
                self._blobs.delete(checkpoint_key(self._claim.work_id, attempt, kind))
        except FileNotFoundError:
            log.info("%s: a checkpoint was overtaken by a newer one", self._claim.work_id)
        except (OSError, StoreError) as error:
            log.warning("%s: a checkpoint could not be stored: %s", self._claim.work_id, error)
        finally:
            remove(taken)


def _is_a_file_of_its_own(path: Path) -> bool:
    """Asked after the move: before, the child could put a link to another file in its place."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def fetch_earlier(blobs: Blobs, claim: Claim, folder: Path) -> dict[str, Path]:
    """Copies the newest checkpoint of each kind that earlier attempts have stored to `folder`; their paths by kind."""
    found: dict[str, Path] = {}
    for kind in KINDS:
        for attempt in range(claim.attempt - 1, 0, -1):
            path = folder / f"checkpoint-{kind}"
            path.unlink(missing_ok=True)
            try:
                blobs.fetch(checkpoint_key(claim.work_id, attempt, kind), path)
            except BlobMissing:
                continue
            found[kind] = path
            break
    return found


def remove_checkpoints(blobs: Blobs, job_id: str) -> None:
    """Those of a job that has ended. What cannot be removed now is found by `remove_of_ended`."""
    try:
        blobs.delete_prefix(checkpoint_prefix(job_id))
    except (OSError, StoreError) as error:
        log.warning("%s: its checkpoints could not be removed: %s", job_id, error)


def remove_of_ended(store: JobStore, blobs: Blobs) -> int:
    """Removes checkpoints of jobs that ended while nobody was there to remove them; how many jobs there were."""
    try:
        left = blobs.jobs_with_checkpoints()
    except (OSError, StoreError) as error:
        log.warning("the checkpoints could not be listed: %s", error)
        return 0
    ended = store.ended(left)
    for job_id in ended:
        remove_checkpoints(blobs, job_id)
    return len(ended)
