"""Too much of everything."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from tests.worker.sandbox.probes.request import ProbeRequest


def fork_bomb(request: ProbeRequest) -> None:
    """Every process forks for ever. A bomb that nobody defuses ends itself after a moment, for the machine's sake."""
    first, until = os.getpid(), time.monotonic() + 4
    while time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            os.fork()
    if os.getpid() != first:
        os._exit(0)


def many_processes(request: ProbeRequest, count: int) -> None:
    for _ in range(count):
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
    time.sleep(1)


def many_threads(request: ProbeRequest, count: int) -> None:
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
    time.sleep(1)


def fill(request: ProbeRequest, how: str, files: int, size: int) -> None:
    """Writes far more than is granted, none of it in one large file."""
    chunk, kept = bytes(1 << 20), []
    for i in range(files):
        path = {"shared": Path(f"/dev/shm/probe-{os.getpid()}-{i}")}.get(how, request.work / str(i))
        with path.open("wb") as file:
            if how == "deleted":
                path.unlink()
                kept.append(os.dup(file.fileno()))
            for _ in range(size >> 20):
                file.write(chunk)
            file.flush()
        time.sleep(0.05)
    time.sleep(1)


def empty_files(request: ProbeRequest, count: int) -> None:
    for i in range(count):
        os.close(os.open(request.work / str(i), os.O_CREAT | os.O_WRONLY))
    time.sleep(1)


def print_for_ever(request: ProbeRequest, size: int) -> None:
    for _ in range(size >> 20):
        os.write(2, b"\x1b[2J" + b"x" * ((1 << 20) - 5) + b"\n")
    time.sleep(1)


def two_mappings(request: ProbeRequest, size: int) -> None:
    """Memory that belongs to no process's private pages."""
    import mmap

    held = mmap.mmap(-1, size)
    for _ in range(size >> 20):
        held.write(bytes(1 << 20))
    time.sleep(1)


def leave_in_shared_memory(request: ProbeRequest) -> str:
    name = f"/dev/shm/probe-{os.getpid()}"
    Path(name).write_bytes(bytes(1 << 20))
    return name


def nest(request: ProbeRequest) -> None:
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    time.sleep(5)


def unreadable(request: ProbeRequest) -> None:
    os.mkdir("closed", 0o300)
    time.sleep(5)
