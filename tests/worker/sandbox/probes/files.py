"""Reading and writing where a job has no business, and where it has."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from tests.worker.sandbox.probes.request import ProbeRequest, call, number
from worker.sandbox.kernel import syscall


def read(request: ProbeRequest, path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def list_names(request: ProbeRequest, path: str) -> None:
    os.listdir(path)


def execute(request: ProbeRequest, path: str) -> None:
    subprocess.run([path], check=True, stdin=subprocess.DEVNULL)


def execute_own(request: ProbeRequest) -> None:
    """A program that the job itself wrote."""
    program = request.work / "program"
    program.write_text("#!/bin/sh\n")
    descriptor = os.open(request.work / "other", os.O_WRONLY | os.O_CREAT, 0o700)
    os.write(descriptor, program.read_bytes())
    os.close(descriptor)
    subprocess.run([request.work / "other"], check=True)


def write(request: ProbeRequest, path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"mine")


def replace(request: ProbeRequest, path: str) -> None:
    own = request.work / "own"
    own.write_text("mine")
    os.replace(own, path)


def unlink(request: ProbeRequest, path: str) -> None:
    os.unlink(path)


def make_folder(request: ProbeRequest, path: str) -> None:
    os.mkdir(path)


def link(request: ProbeRequest, path: str) -> None:
    """A second name for a file in the folder that may be written to, and a word into it."""
    os.link(path, request.work / "linked")
    write(request, str(request.work / "linked"))


def follow(request: ProbeRequest, path: str) -> None:
    os.symlink(path, request.work / "symlink")
    write(request, str(request.work / "symlink"))


def truncate(request: ProbeRequest, path: str) -> None:
    os.truncate(path, 0)


def open_truncating(request: ProbeRequest, path: str) -> None:
    """Truncates a file that is opened for reading alone."""
    os.close(os.open(path, os.O_RDONLY | os.O_TRUNC))


def openat2(request: ProbeRequest, path: str) -> None:
    how, at_fdcwd = (os.O_RDONLY | os.O_TRUNC).to_bytes(8, "little") + bytes(16), -100
    buffers = [ctypes.create_string_buffer(content) for content in (path.encode(), how)]
    os.close(syscall(number("openat2"), at_fdcwd, *buffers, len(how)))


def change_mode(request: ProbeRequest, path: str) -> None:
    os.chmod(path, 0o777)


def change_owner(request: ProbeRequest, path: str) -> None:
    os.chown(path, os.getuid(), os.getgid())


def watch_names(request: ProbeRequest, path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    call("inotify_add_watch", descriptor, path.encode(), 0x100)


def rename_elsewhere(request: ProbeRequest) -> None:
    (request.work / "folder").mkdir()
    (request.work / "file").touch()
    os.rename(request.work / "file", request.work / "folder" / "file")


def own_scratch(request: ProbeRequest) -> str:
    """What programs do to files of their own."""
    folder = request.work / "a" / "b"
    folder.mkdir(parents=True)
    file = folder / "file"
    file.write_text("text")
    file.chmod(0o600)
    os.link(file, folder / "hard")
    os.symlink("file", folder / "soft")
    with file.open("r+") as opened:
        opened.truncate(2)
    file.replace(folder / "renamed")
    shutil.copy(folder / "renamed", folder / "copied")
    shutil.copy2(folder / "renamed", request.work)
    (folder / "soft").unlink()
    return (folder / "hard").read_text()


def devices(request: ProbeRequest) -> str:
    Path(os.devnull).write_text("x")
    return str(len(Path("/dev/urandom").open("rb").read(8)))
