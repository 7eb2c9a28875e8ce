"""A resumable upload in a folder: one file that grows, and is renamed when all of it has come."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from app.contract.blobs.base import CHUNK_BYTES
from app.contract.blobs.partial import Partial
from app.contract.errors import BlobMissing, ServiceUnavailable, UploadLocked


class FolderPartial(Partial):
    """The file, under a lock of the kernel's: it ends with the process that holds it, however that dies.

    Opening raises UploadLocked while somebody else has it open.
    """

    exclusive = True
    flush_seconds = 1.0

    def __init__(self, path: Path, target: Callable[[str], Path]) -> None:
        super().__init__()
        self._path, self._target = path, target
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file object and not its number, which after a close could be that of another file.
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b", 0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._number), path.stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):  # in use, or removed or renamed between the two calls
            self._file.close()
            raise UploadLocked() from None

    @property
    def _number(self) -> int:
        return self._file.fileno()

    def begin(self, offset: int, attempt: int) -> None:
        """As in Partial."""
        if os.fstat(self._number).st_size < offset:
            raise BlobMissing("The upload's bytes are gone. It was removed: send the file again from its start.")
        # Behind the offset is what was never acknowledged: after a power cut it may be anything.
        self._file.truncate(offset)
        self._file.seek(offset)
        self.readable = offset
        if not offset:
            sync_folder(self._path.parent)  # the file itself outlives a power cut

    def write(self, chunk: bytes | memoryview) -> None:
        """As in Partial."""
        rest = memoryview(chunk)
        with told_when_full():
            while rest:
                rest = rest[self._file.write(rest) :]
        self.readable += len(chunk)

    def seal(self) -> Callable[[], None]:
        """As in Partial."""

        def durable() -> None:
            with told_when_full():
                os.fdatasync(self._number)

        return durable

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """As in Partial."""
        while start < end and (piece := os.pread(self._number, min(CHUNK_BYTES, end - start), start)):
            yield piece
            start += len(piece)

    def promote(self, sha256: str) -> None:
        """As in Partial: no byte is copied."""
        target = self._target(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        with told_when_full():
            os.fsync(self._number)
        self._path.replace(target)
        sync_folder(target.parent)

    def discard(self) -> None:
        """As in Partial."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """As in Partial. A file into which nothing ever came is removed."""
        found = os.fstat(self._number)
        if not found.st_size and found.st_nlink:
            self.discard()
        self._file.close()


@contextlib.contextmanager
def told_when_full() -> Iterator[None]:
    """A full disk is the service's trouble, and passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ServiceUnavailable("The service has no room left for this file.") from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes the appearance of a file in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
