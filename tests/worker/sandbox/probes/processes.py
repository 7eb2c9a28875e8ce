"""Reaching into other processes, and what a job may do to its own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.worker.sandbox.probes.request import ProbeRequest, call


def parent(request: ProbeRequest) -> str:
    """The fork server, asked for with a signal that does nothing."""
    os.kill(os.getppid(), 0)
    return "reached"


def kill(request: ProbeRequest, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def kill_group(request: ProbeRequest, pid: int) -> None:
    os.killpg(pid, signal.SIGTERM)


def kill_thread(request: ProbeRequest, pid: int) -> None:
    call("tgkill", pid, pid, signal.SIGTERM)


def kill_task(request: ProbeRequest, pid: int) -> None:
    call("tkill", pid, signal.SIGTERM)


def queue_signal(request: ProbeRequest, pid: int) -> None:
    info = bytearray(128)  # siginfo_t with the code SI_QUEUE
    info[8:12] = (-1).to_bytes(4, "little", signed=True)
    call("rt_sigqueueinfo", pid, signal.SIGTERM, bytes(info))


def signal_descriptor(request: ProbeRequest, pid: int) -> None:
    signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGTERM)


def signal_by_input(request: ProbeRequest, pid: int) -> None:
    """A pipe whose news are sent to another process as a signal."""
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, pid)
    fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")


def limit(request: ProbeRequest, pid: int) -> None:
    import resource

    resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def slow_down(request: ProbeRequest, pid: int) -> None:
    os.setpriority(os.PRIO_PROCESS, pid, 19)


def pin(request: ProbeRequest, pid: int, processors: set[int]) -> None:
    os.sched_setaffinity(pid, processors)


def trace(request: ProbeRequest, pid: int) -> None:
    seize = 0x4206
    call("ptrace", seize, pid, 0, 0)


def read_memory(request: ProbeRequest, pid: int) -> None:
    """A word of another process's stack or heap, wherever its memory begins."""
    start = int(Path(f"/proc/{pid}/maps").read_text().split("-")[0], 16)
    target = ctypes.create_string_buffer(8)
    local = ctypes.addressof(target).to_bytes(8, "little") + (8).to_bytes(8, "little")
    remote = start.to_bytes(8, "little") + (8).to_bytes(8, "little")
    call("process_vm_readv", pid, local, 1, remote, 1, 0)


def steal_descriptor(request: ProbeRequest, pid: int) -> None:
    call("pidfd_getfd", os.pidfd_open(pid), 0, 0)


def look_into(request: ProbeRequest, pid: int, name: str) -> None:
    """A file of /proc that tells what a process keeps to itself."""
    path = f"/proc/{pid}/{name}"
    if name in ("cwd", "exe", "root", "fd/0"):
        os.readlink(path)
    else:
        with open(path, "rb", buffering=0) as file:
            file.read(0 if name == "mem" else 1)


def own_process(request: ProbeRequest) -> str:
    """What programs read of themselves, here and in a program that is started."""
    code = "import os; print(len(open('/proc/self/maps').read()) > 0, len(os.listdir('/proc/self/fd')) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return f"{done.stdout.strip()} {'VmRSS' in Path('/proc/self/status').read_text()}"


def own_signals(request: ProbeRequest) -> str:
    """To a subprocess, to itself, and to the group without harm."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        process.terminate()
        ended = process.wait(10)
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    signal.raise_signal(signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.killpg(0, 0)
    return f"{ended} {len(seen)}"


def name_a_thread(request: ProbeRequest) -> None:
    """As CUDA does at its start: by its file, for a thread that was started later."""
    started, end = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), end.wait()))
    thread.start()
    started.wait()
    try:
        write_text = Path(f"/proc/self/task/{thread.native_id}/comm").write_text
        write_text("cuda")
    finally:
        end.set()
