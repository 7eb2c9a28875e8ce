"""The bytes of a resumable upload while they come, and how they become a blob."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import obstore
from obstore.store import ObjectStore

from app.contract.blobs import keys
from app.contract.blobs.base import CHUNK_BYTES, MAX_PARTS
from app.contract.errors import BlobMissing

if TYPE_CHECKING:
    from obstore import WritableFile


class Partial(ABC):
    """What has come of one upload, open for going on with it. Every method blocks."""

    # Whether the store itself keeps everybody else out while this is open.
    exclusive: ClassVar[bool]
    # Bytes of a slow client are made durable this often; each time costs a little.
    flush_seconds: ClassVar[float]

    def __init__(self) -> None:
        self.readable = 0  # up to here `read` can go

    @abstractmethod
    def begin(self, offset: int, attempt: int) -> None:
        """Goes on after `offset` bytes; whatever is behind them is forgotten. Raises BlobMissing where they are gone.

        `attempt` grows with everyone who goes on with this upload.
        """

    @abstractmethod
    def write(self, chunk: bytes | memoryview) -> None:
        """Appends."""

    @abstractmethod
    def seal(self) -> Callable[[], None]:
        """A call that makes durable what was written so far; more may be written while it runs."""

    @abstractmethod
    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes up to but not including `end`, in pieces."""

    @abstractmethod
    def promote(self, sha256: str) -> None:
        """Makes all of it the blob of this digest, durable when this returns."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what is left of it."""

    @abstractmethod
    def close(self) -> None:
        """Lets others go on with it."""


@dataclass(frozen=True)
class Part:
    """An object that holds some of the bytes."""

    start: int
    size: int
    key: str

    @property
    def end(self) -> int:
        return self.start + self.size


class ObjectPartial(Partial):
    """In an object store, which cannot append: each stretch of bytes is an object of its own.

    A key names where the stretch begins and by which attempt. An attempt that lost its hold may still leave an object;
    a later attempt begins at or before it, so of several at one place the latest attempt's is the one that counts.
    """

    exclusive = False
    flush_seconds = 10.0

    def __init__(self, store: ObjectStore, upload_id: str) -> None:
        super().__init__()
        self._store = store
        self._prefix = keys.partial_prefix(upload_id)
        self._parts: list[Part] = []
        self._written = self._attempt = 0
        self._open: tuple[Part, WritableFile] | None = None

    def begin(self, offset: int, attempt: int) -> None:
        """As in Partial."""
        self._parts = self._find(offset)
        self._attempt = attempt
        self._written = self.readable = offset

    def _find(self, end: int) -> list[Part]:
        latest: dict[int, tuple[int, Part]] = {}
        for batch in obstore.list(self._store, self._prefix):
            for found in batch:
                start, attempt = keys.parse_part(found["path"])
                if start not in latest or latest[start][0] < attempt:
                    latest[start] = attempt, Part(start, found["size"], found["path"])
        parts: list[Part] = []
        while (here := parts[-1].end if parts else 0) < end:
            if here not in latest:
                raise BlobMissing(f"The upload's bytes are gone from {here} on. It was removed: send the file again.")
            parts.append(latest[here][1])
        return parts

    def write(self, chunk: bytes | memoryview) -> None:
        """As in Partial."""
        if self._open is None:
            part = Part(self._written, 0, keys.part_key(self._prefix, self._written, self._attempt))
            self._open = part, obstore.open_writer(self._store, part.key, buffer_size=2 * CHUNK_BYTES)
        self._open[1].write(bytes(chunk))  # a copy: the writer keeps it while it sends
        self._written += len(chunk)

    def seal(self) -> Callable[[], None]:
        """As in Partial: closes the object, and the next byte begins another."""
        sealed, self._open, end = self._open, None, self._written

        def durable() -> None:
            if sealed is not None:
                part, writer = sealed
                writer.close()
                self._parts.append(Part(part.start, end - part.start, part.key))
                self.readable = end

        return durable

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """As in Partial."""
        for part in self._parts:
            first, last = max(start, part.start), min(end, part.end)
            if first < last:
                span = (first - part.start, last - part.start)
                found = obstore.get(self._store, part.key, options={"range": span})
                yield from (bytes(piece) for piece in found.stream(min_chunk_size=CHUNK_BYTES))

    def promote(self, sha256: str) -> None:
        """As in Partial: by sending all of it through this process once more."""
        size = self._written
        buffer_bytes = max(2 * CHUNK_BYTES, -(-size // MAX_PARTS))
        writer = obstore.open_writer(self._store, keys.blob_key(sha256), buffer_size=buffer_bytes)
        for piece in self.read(0, size):
            writer.write(piece)
        writer.close()
        self.discard()

    def discard(self) -> None:
        """As in Partial."""
        for batch in obstore.list(self._store, self._prefix, chunk_size=keys.DELETE_BATCH):
            obstore.delete(self._store, [found["path"] for found in batch])

    def close(self) -> None:
        """As in Partial. An object that was not sealed never appears."""
        self._open = None
