"""Privileges, namespaces and what the filter refuses besides; what a child inherits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from tests.worker.sandbox.probes.request import ProbeRequest, call, number
from worker.sandbox.kernel import prctl, syscall


def capabilities(request: ProbeRequest) -> str:
    """The effective ones of this process and of a program that it starts, and whether a program can bring more."""
    started = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    texts = (Path("/proc/self/status").read_text(), started)
    found = [dict(line.split(":\t") for line in text.splitlines() if ":\t" in line) for text in texts]
    return " ".join(f"{int(one['CapEff'], 16)}/{one['NoNewPrivs']}" for one in found)


def open_namespace(request: ProbeRequest) -> None:
    new_user = 0x10000000
    call("unshare", new_user)


def clone_namespace(request: ProbeRequest) -> None:
    new_user = 0x10000000
    pid = syscall(number("clone"), new_user | signal.SIGCHLD, None, None, None, None)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def hide(request: ProbeRequest) -> None:
    """Makes its memory unreadable to a supervisor that is not root."""
    prctl(4, 0)


def compat_call(request: ProbeRequest) -> None:
    """getpid by the numbers of 32-bit programs, which mean other calls to the filter."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("53 b814000000 cd80 5b c3"))  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    assert function() == os.getpid()


def raw_call(request: ProbeRequest, number: int, *arguments: int) -> None:
    syscall(number, *arguments)


def call_by_name(request: ProbeRequest, name: str, *arguments: int) -> None:
    syscall(number(name), *arguments)


def leave_the_group(request: ProbeRequest) -> str:
    """A daemon: two forks and a session of its own. Says its number, its group and its session."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            (request.work / "daemon").write_text(f"{os.getpid()} {os.getpgid(0)} {os.getsid(0)}")
            time.sleep(60)
        os._exit(0)
    note = request.work / "daemon"
    while not note.exists() or not note.read_text():
        time.sleep(0.01)
    return note.read_text()


def inherited(request: ProbeRequest) -> str:
    """What is open besides the standard streams."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}").split(":")[0]))
    return str(sorted(target for descriptor, target in found if descriptor > 2))


def environment(request: ProbeRequest) -> str:
    """Every name, also those that the process was started with."""
    started = Path("/proc/self/environ").read_bytes().decode().split("\0")
    return " ".join(sorted({*os.environ, *(entry.split("=")[0] for entry in started)}))


def later_threads_and_programs(request: ProbeRequest, path: str) -> str:
    """The walls hold in a thread, in a fork and in a program that were started after they stood."""
    said: list[str] = []

    def attempt() -> None:
        try:
            Path(path).read_bytes()
            said.append("reached")
        except OSError as error:
            said.append(errno.errorcode[error.errno or 0])

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    program = subprocess.run(["cat", path], capture_output=True, text=True)
    said.append(program.stderr.strip().rpartition(": ")[2] or "reached")
    reader, writer = os.pipe()
    if os.fork() == 0:
        attempt()
        os.write(writer, said[-1].encode())
        os._exit(0)
    os.wait()
    return ", ".join([*said, os.read(reader, 100).decode()])
