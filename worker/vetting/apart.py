"""A call in a process of its own: what ends that process, or takes too much memory, does not end this one."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path


def apart(call: Callable[[], str], more_bytes: int) -> str | None:
    """What `call` returns in a fork that may take `more_bytes` of address space beyond what this process has.

    None where the fork ended without a word: it crashed, raised, or asked for more.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            limit = _address_space() + more_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            os.write(writer, call().encode())
            os._exit(0)
        os._exit(1)  # no exit handlers, which belong to the parent
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said.decode() if status == 0 else None


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
