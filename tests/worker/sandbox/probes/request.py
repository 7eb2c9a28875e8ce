"""What every probe gets, and system calls by their names."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.sandbox.bpf import ARCHITECTURES
from worker.sandbox.kernel import syscall
from worker.sandbox.syscalls import NUMBERS


@dataclass(frozen=True)
class ProbeRequest:
    """`work` can be written to, `inputs` is the uploaded file."""

    probe: str
    work: Path
    inputs: Path
    arguments: tuple[Any, ...]


def number(name: str) -> int:
    """Of a system call, here."""
    found = NUMBERS[name][ARCHITECTURES[platform.machine()].column]
    assert found is not None
    return found


def call(name: str, *arguments: Any) -> None:
    """One system call by its name; bytes are passed as a buffer."""
    syscall(number(name), *(ctypes.create_string_buffer(a) if isinstance(a, bytes) else a for a in arguments))
