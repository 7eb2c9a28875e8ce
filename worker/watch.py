"""Holds a running group of processes to its limits, from outside: processes, memory, disk, time.

The kernel's own limits count by process or by user, and control groups are not ours to make on most hosts; so the
supervisor looks at every tick, and ends the whole group with one signal that no fork escapes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

from app.contract.errors import JobFailed, OutOfMemory, ServiceUnavailable, TimedOut
from worker.limits import Limits, Memory, members, memory_of, most_memory_of, threads_of
from worker.scratch import LOG, WORK
from worker.shared_memory import SharedMemory, deleted_files

ENTRY_BYTES = 4096  # what a file or folder costs at least, so that a flood of empty ones ends too
SCAN_SECONDS = 0.02  # of a tick; a larger folder is counted over several
COUNT_SECONDS = 0.05  # a fork bomb doubles in less than this
COUNTED_SHARE = 0.9  # of the memory that is granted, up to which counters are believed: they may be a little behind
RESERVE_BYTES = 256 << 20  # left on the disk for the database and the blobs that may share it


class Watch:
    """Of one child's group. `noun` says in messages to the client what it is."""

    def __init__(self, attempt: Path, limits: Limits, noun: str) -> None:
        self._attempt, self._limits, self._noun = attempt.resolve(), limits, noun
        self._deadline = time.monotonic() + limits.seconds
        self._shared_memory = SharedMemory()
        self._written = 0
        self._scan = _entries(attempt / WORK)
        self._counting = 0

    def check_time(self) -> None:
        """Raises TimedOut."""
        if time.monotonic() > self._deadline:
            limit = self._limits.seconds
            raise TimedOut(f"The {self._noun} ran longer than the {limit:g} s that this worker grants one.")

    def check(self, group: int) -> None:
        """Raises JobFailed, or OutOfMemory, for what the group uses; ServiceUnavailable where the disk is full."""
        pids = members(group)
        self._check_processes(pids)
        for measure, share in ((most_memory_of, COUNTED_SHARE), (memory_of, 1.0)):  # the cheap one first
            memory = self._memory(group, pids, measure)
            # Behind the processes: a file that one of them lets go of meanwhile is found here.
            deleted = deleted_files(pids, self._attempt)
            used = memory.own + max(memory.shared, deleted.memory + self._shared_memory.named_bytes())
            if used <= share * self._limits.memory_bytes:
                break
        else:
            raise self._too_much(used)
        self._check_disk(deleted.disk)

    def close(self) -> None:
        """Ends the count, and removes what the group left in shared memory. Nothing of it runs any more."""
        self._scan.close()
        self._shared_memory.remove_leftovers()

    def _check_processes(self, pids: list[int]) -> None:
        limit = self._limits.processes
        if (running := threads_of(pids)) > limit:
            raise JobFailed(f"The {self._noun} ran {running} processes and threads; this worker grants {limit}.")

    def _memory(self, group: int, pids: list[int], measure: Callable[[int], Memory]) -> Memory:
        """Measured one by one, which takes long where many fork at once: meanwhile they are counted again."""
        memory, counted_at = Memory(0, 0), time.monotonic()
        for pid in pids:
            found = measure(pid)
            memory = Memory(memory.own + found.own, memory.shared + found.shared)
            if time.monotonic() - counted_at > COUNT_SECONDS:
                self._check_processes(members(group))
                counted_at = time.monotonic()
        return memory

    def _too_much(self, used: int) -> OutOfMemory:
        return OutOfMemory(
            f"The {self._noun} used {used >> 20} MiB of memory; this worker grants "
            f"{self._limits.memory_bytes >> 20} MiB. Use a smaller batch size or a larger worker."
        )

    def _check_disk(self, deleted: int) -> None:
        self._count()
        limit = self._limits.disk_bytes
        if max(self._written, self._counting) + deleted + _size(self._attempt / LOG) > limit:
            raise JobFailed(f"The {self._noun} wrote more than {limit} bytes, the most that this worker grants.")
        disk = os.statvfs(self._attempt)
        if disk.f_bavail * disk.f_frsize < RESERVE_BYTES:
            raise ServiceUnavailable("The worker's disk is full. Try again later.")

    def _count(self) -> None:
        """Goes on counting the folder, for a moment; `_written` is the latest full count."""
        until = time.monotonic() + SCAN_SECONDS
        try:
            for size in self._scan:
                self._counting += size
                if time.monotonic() > until:
                    return
        except (OSError, RecursionError):
            # Only its own program can have made a folder that its owner cannot read, or that never ends.
            raise JobFailed(f"The {self._noun} made folders that cannot be looked into.") from None
        self._written, self._counting = self._counting, 0
        self._scan = _entries(self._attempt / WORK)


def _entries(folder: Path) -> Generator[int, None, None]:
    """Bytes of each file and folder below one. Follows no link: not even one that takes a folder's place meanwhile."""
    for _, folders, files, descriptor in os.fwalk(folder, onerror=_refuse):
        for name in (*folders, *files):
            yield _size(name, descriptor)


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # those went while they were being counted
        raise error


def _size(path: Path | str, folder: int | None = None) -> int:
    try:
        found = os.stat(path, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:  # it was there a moment ago
        return 0
    return max(ENTRY_BYTES, found.st_blocks * 512)
