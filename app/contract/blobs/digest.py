"""The SHA-256 of an upload that comes in several requests, and in several lives of the service."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from app.contract.blobs.partial import Partial

# How much of an earlier request's bytes is read back for each chunk of this one: several times a chunk, so that the
# hash catches up while more comes in, and little enough that nobody waits for it.
CATCH_UP_BYTES = 16 << 20
# Their states take a few hundred bytes each.
MAX_REMEMBERED = 10_000


class RunningDigest:
    """The hash of the first `offset` bytes. Its state cannot be stored: a fresh one reads back what is there."""

    def __init__(self) -> None:
        self.offset = 0
        self._hash = hashlib.sha256()

    def copy(self) -> RunningDigest:
        """As it is now."""
        made = RunningDigest()
        made.offset, made._hash = self.offset, self._hash.copy()
        return made

    def follow(self, partial: Partial, start: int, chunk: bytes | memoryview) -> None:
        """Takes in a chunk that begins at `start`, or some of what is missing before it."""
        if self.offset < start:
            self.catch_up(partial, min(start, partial.readable, self.offset + CATCH_UP_BYTES))
        if self.offset == start:
            self._hash.update(chunk)
            self.offset += len(chunk)

    def catch_up(self, partial: Partial, end: int) -> None:
        """Reads back what is missing before `end`."""
        for piece in partial.read(self.offset, end):
            self._hash.update(piece)
            self.offset += len(piece)

    def hexdigest(self) -> str:
        """Of the bytes taken in so far."""
        return self._hash.hexdigest()


class RecentDigests:
    """What this process knows of the uploads that it saw last. Only durable, acknowledged bytes may be in there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: OrderedDict[str, RunningDigest] = OrderedDict()

    def get(self, upload_id: str, offset: int) -> RunningDigest:
        """A copy to go on with where the upload stands at `offset`; a fresh one where nothing is known."""
        with self._lock:
            found = self._digests.get(upload_id)
            return RunningDigest() if found is None or found.offset > offset else found.copy()

    def put(self, upload_id: str, digest: RunningDigest) -> None:
        """Remembers it; it may not be changed any more."""
        with self._lock:
            self._digests[upload_id] = digest
            self._digests.move_to_end(upload_id)
            if len(self._digests) > MAX_REMEMBERED:
                self._digests.popitem(last=False)

    def forget(self, upload_id: str) -> None:
        """The upload is over."""
        with self._lock:
            self._digests.pop(upload_id, None)
