"""What a child may use: files and core dumps by rlimit, memory by watching its whole process group."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

MAX_OPEN_FILES = 4096
PR_SET_PDEATHSIG = 1
MACHINE_SHARE = 0.9  # the rest is for the worker, the page cache and the system


@dataclass(frozen=True)
class Limits:
    """Of one attempt."""

    memory_bytes: int
    file_bytes: int
    seconds: float
    threads: int


def apply_in_child(limits: Limits) -> None:
    """Runs first thing in the child: whatever it starts later inherits all of it."""
    _lower(resource.RLIMIT_FSIZE, limits.file_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Where the machine runs out of memory, the kernel is to take the child and not the worker.
        Path("/proc/self/oom_score_adj").write_text("1000")


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def group_memory(group: int) -> int:
    """Bytes of memory that the processes of a group hold for themselves; shared pages are counted in shares.

    Pages of mapped files do not count: the kernel takes them back at will.
    """
    return sum(_process_memory(pid) for pid in members(group))


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


def _process_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return _resident(pid) if sys.platform != "linux" else 0
    except PermissionError:  # a process may hide its details, but not how large it is
        return _resident(pid)
    fields = dict(line.split(":", 1) for line in lines[1:])
    counted = ("Pss_Anon", "Pss_Shmem", "SwapPss") if "Pss_Anon" in fields else ("Pss",)
    return sum(int(fields[name].split()[0]) * 1024 for name in counted if name in fields)


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
