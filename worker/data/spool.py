"""Where samples lie while a dataset is open: on disk, found by offset, in a few bytes of memory each."""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path

from worker.vetting.archive import Member
from worker.vetting.section import Section

WRITE_BYTES = 1 << 20  # gathered before they are written
_ELSEWHERE = (1 << 32) - 1  # the file number of a member that lies in no file as it is


class Spool:
    """A file that grows at its end and is read by offset. Its disk space is given back with the scratch folder."""

    def __init__(self, scratch: Path, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=scratch)) / "spool"
        self._file = self.path.open("x+b", buffering=WRITE_BYTES)
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._flushed = 0

    def write(self, data: bytes) -> int:
        """Appends; where it starts."""
        start = self._end
        self._file.write(data)
        self._end += len(data)
        return start

    def read(self, start: int, size: int) -> bytes:
        if self._flushed < self._end:
            self.flush()
        return os.pread(self._file.fileno(), size, start)

    def flush(self) -> None:
        """Makes what was written readable through the path."""
        self._file.flush()
        self._flushed = self._end


class Records(Sequence[bytes]):
    """Byte strings in a spool, 16 bytes of memory each."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._starts: array[int] = array("Q")
        self._sizes: array[int] = array("Q")

    def append(self, data: bytes) -> None:
        self._starts.append(self._spool.write(data))
        self._sizes.append(len(data))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # by index alone
        return self._spool.read(self._starts[index], self._sizes[index])


class Members(Sequence[Member]):
    """Files by index: 36 bytes of memory each for those that are stretches of files, whose names are spooled."""

    def __init__(self, spool: Spool) -> None:
        self._names = Records(spool)
        self._files: list[Path] = []
        self._numbers: dict[Path, int] = {}
        self._others: list[Member] = []
        self._file: array[int] = array("I")
        self._start: array[int] = array("Q")
        self._size: array[int] = array("Q")

    def append(self, member: Member) -> None:
        place = member.section
        if place is None:
            self._place(_ELSEWHERE, len(self._others), member.size)
            self._others.append(member)
            self._names.append(b"")
            return
        number = self._numbers.setdefault(place.path, len(self._files))
        if number == len(self._files):
            self._files.append(place.path)
        self._place(number, place.start, place.size)
        self._names.append(member.name.encode())

    def _place(self, file: int, start: int, size: int) -> None:
        self._file.append(file)
        self._start.append(start)
        self._size.append(size)

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> Member:  # type: ignore[override]  # by index alone
        if self._file[index] == _ELSEWHERE:
            return self._others[self._start[index]]
        place = Section(self._files[self._file[index]], self._start[index], self._size[index])
        return Member(self._names[index].decode(), place.size, place.open, place)
