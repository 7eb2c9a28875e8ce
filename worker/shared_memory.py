"""Named shared memory and semaphores: the one place outside of its scratch folder where a job may leave files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")  # noqa: S108 - the C library's own choice on Linux; elsewhere there is none
ANONYMOUS = "/memfd:"  # how the kernel names files of memory that never had a name


class SharedMemory:
    """What appears there after this moment, under this user: a job's, or that of another program of the user."""

    def __init__(self) -> None:
        self._before = {entry.inode() for entry in _entries()}

    def named_bytes(self) -> int:
        """Memory in new files."""
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in self._new())

    def remove_leftovers(self) -> None:
        """Removes new files that no living process holds. Pools of processes delete theirs once they have them."""
        if leftovers := {entry.path for entry in self._new()}:
            for path in leftovers - set(_held_names()):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def _new(self) -> Iterator[os.DirEntry[str]]:
        for entry in _entries():
            with contextlib.suppress(FileNotFoundError):
                if entry.inode() not in self._before and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    yield entry


@dataclass(frozen=True)
class Deleted:
    """Bytes of open files that have no name any more, on disk and in memory."""

    disk: int
    memory: int


def deleted_files(pids: Iterable[int], folder: Path) -> Deleted:
    """What processes hold open and nobody can list; on disk only below `folder`. A file counts once."""
    disk: dict[tuple[int, int], int] = {}
    memory: dict[tuple[int, int], int] = {}
    for descriptor in _descriptors(pids):
        with contextlib.suppress(OSError):  # closed, or ended, or not to be looked at
            found = os.stat(descriptor)
            if found.st_nlink:
                continue
            name = os.readlink(descriptor)
            for prefixes, files in (((f"{folder}/",), disk), ((ANONYMOUS, f"{FOLDER}/"), memory)):
                if name.startswith(prefixes):
                    files[found.st_dev, found.st_ino] = found.st_blocks * 512
    return Deleted(sum(disk.values()), sum(memory.values()))


def _descriptors(pids: Iterable[int]) -> Iterator[str]:
    for pid in pids:
        with contextlib.suppress(OSError):
            yield from (f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd"))


def _held_names() -> Iterator[str]:
    """Names there that any process has open or mapped."""
    pids = psutil.pids()
    for descriptor in _descriptors(pids):
        with contextlib.suppress(OSError):
            yield os.readlink(descriptor)
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if f" {FOLDER}/" in line:
                    yield line[line.index(f" {FOLDER}/") + 1 :]


def _entries() -> Iterator[os.DirEntry[str]]:
    if FOLDER.is_dir():
        with os.scandir(FOLDER) as entries:
            yield from entries
