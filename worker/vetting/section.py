"""A stretch of a file, read as a file of its own: what lies in an uncompressed tar needs no copy."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

BUFFER_BYTES = 64 << 10


@dataclass(frozen=True)
class Section:
    """The bytes [start, start + size) of a file."""

    path: Path
    start: int
    size: int

    def open(self) -> IO[bytes]:
        """A stream of these bytes alone, which can seek."""
        return cast(IO[bytes], io.BufferedReader(_Stretch(self), BUFFER_BYTES))

    def within(self, start: int, size: int) -> Section:
        """A stretch of this stretch."""
        return Section(self.path, self.start + start, size)


class _Stretch(io.RawIOBase):
    def __init__(self, section: Section) -> None:
        self._file = section.path.open("rb", buffering=0)
        self._start = section.start
        self._size = section.size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]  # every writable buffer
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
