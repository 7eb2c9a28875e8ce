"""What a child may use, and the figures of its process group that `watch.py` holds against it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

MAX_OPEN_FILES = 4096
PR_SET_PDEATHSIG = 1
MACHINE_SHARE = 0.9  # the rest is for the worker, the page cache and the system


@dataclass(frozen=True)
class Limits:
    """Of one attempt. `processes` counts threads too; `threads` is how many of them compute.

    `data_bytes` is what each process may map for itself beyond what the child has at its start, kept by the kernel at
    once where `memory_bytes` is looked at from time to time; None: as much as it likes, which CUDA needs.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float
    threads: int
    processes: int
    data_bytes: int | None = None


def apply_in_child(limits: Limits) -> None:
    """Runs first thing in the child: whatever it starts later inherits all of it."""
    _lower(resource.RLIMIT_FSIZE, limits.disk_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    if sys.platform == "linux":
        if limits.data_bytes is not None:
            _lower(resource.RLIMIT_DATA, _data_bytes() + limits.data_bytes)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Where the machine runs out of memory, the kernel is to take the child and not the worker.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _data_bytes() -> int:
    """Private writable memory that this process has mapped: what RLIMIT_DATA counts, and the stack of its start."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()


@dataclass(frozen=True)
class Memory:
    """Bytes: `own` of a process alone, `shared` its share of the pages that it has in common with others."""

    own: int
    shared: int


def threads_of(pids: Iterable[int]) -> int:
    """Threads of these processes, the first of each included."""
    return sum(_threads(pid) for pid in pids)


def _threads(pid: int) -> int:
    try:
        # Linux counts them as links, which is far cheaper than to list them.
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    except (FileNotFoundError, ProcessLookupError):
        return 0 if sys.platform == "linux" else 1


def members(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group:
                found.append(pid)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def running(group: int) -> bool:
    """Whether any process of a group still runs; one that has ended and was not collected does not."""
    return any(not _ended(pid) for pid in members(group))


def _ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def memory_of(pid: int) -> Memory:
    """What a process holds. Pages of mapped files do not count: the kernel takes them back at will."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return Memory(_resident(pid) if sys.platform != "linux" else 0, 0)
    except PermissionError:  # a process may hide its details, but not how large it is
        return Memory(_resident(pid), 0)
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    if "Pss_Anon" not in kib:
        return Memory(kib["Pss"] << 10, 0)
    return Memory((kib["Pss_Anon"] + kib.get("SwapPss", 0)) << 10, kib["Pss_Shmem"] << 10)


def most_memory_of(pid: int) -> Memory:
    """At most what a process holds, as if it shared nothing: counters that cost nothing to read.

    For `memory_of` the kernel goes through all of its pages, tenths of a second for some gigabytes, in which the
    process gets no new ones.
    """
    try:
        # The name of a process may be any bytes.
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return memory_of(pid)
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    if "RssAnon" not in sizes:  # it has ended, or the kernel does not say
        return memory_of(pid)
    anon, swap, shared = (int(sizes[name][0]) << 10 for name in ("RssAnon", "VmSwap", "RssShmem"))
    return Memory(anon + swap, shared)


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def memory_of_machine() -> int:
    """Bytes that this machine or its container may use."""
    total = int(psutil.virtual_memory().total)
    try:
        granted = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if granted == "max" else min(total, int(granted))


def memory_of_one_job(configured: int, concurrency: int) -> int:
    """The setting, or an equal share of the machine."""
    return configured or int(MACHINE_SHARE * memory_of_machine() / concurrency)


def threads_of_one_job(configured: int, concurrency: int) -> int:
    """The setting, or an equal share of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return configured or max(1, cores // concurrency)
