"""What the standard library does not ask the kernel for. Every call raises OSError with what the kernel says."""

from __future__ import annotations

import ctypes
import os

Buffer = ctypes.Array[ctypes.c_char]
"""Made by `ctypes.create_string_buffer`."""

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: int | Buffer | None) -> int:
    """A system call by its number."""
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *given))


def prctl(option: int, *arguments: int) -> int:
    """An operation on the calling process; arguments that are not given are 0."""
    filled = (*arguments, 0, 0, 0, 0)[:4]
    return _checked(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(value) for value in filled)))


def capget(header: Buffer, sets: Buffer) -> None:
    """The capabilities of the calling thread."""
    _checked(_libc.capget(header, sets))


def capset(header: Buffer, sets: Buffer) -> None:
    """Sets the capabilities of the calling thread."""
    _checked(_libc.capset(header, sets))


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
