"""Landlock: which files this process and all that it starts may still open, and whom they may signal.

Linux 5.13 (ABI 1) and newer, without privileges. Each newer ABI controls more; what a kernel does not know is left out,
and `seccomp.py` stands in for it where it matters. See the kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

from worker.sandbox.kernel import syscall

# The numbers are the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
# The newest ABI that this module was written for; a newer kernel offers all of it.
NEWEST = 7


class Access(IntFlag):
    """What may be done to files (ABI 1 unless said)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # ABI 2: rename and link into another folder; before it, never allowed
    TRUNCATE = 1 << 14  # ABI 3: before it, never refused
    IOCTL_DEV = 1 << 15  # ABI 5: before it, never refused


# What a rule on a single file may grant; the rest is for folders.
FILE = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1  # ABI 4
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1 << 0, 1 << 1  # ABI 6


def abi() -> int:
    """The version that this kernel offers; 0 where it offers none, or where a container's filter refuses the call."""
    if sys.platform != "linux":
        return 0
    try:
        return min(NEWEST, syscall(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION))
    except OSError:
        return 0


def restrict(grants: Iterable[tuple[Path, Access]], version: int, network: bool = False) -> None:
    """From here on, of all files only the granted ones, at and below each path; no TCP; no signals to the outside.

    A path that does not exist grants nothing. With `network`, TCP is left to others. Binds the calling thread and what
    it starts, for ever. Raises OSError.
    """
    attributes = ruleset_attributes(version, network)
    ruleset = syscall(CREATE_RULESET, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    try:
        for path, access in grants:
            _grant(ruleset, path, access & handled(version))
        syscall(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def handled(version: int) -> Access:
    """Every access to files that an ABI controls: what is handled and not granted is refused."""
    access = Access(Access.REFER - 1)
    for since, more in ((2, Access.REFER), (3, Access.TRUNCATE), (5, Access.IOCTL_DEV)):
        if version >= since:
            access |= more
    return access


def ruleset_attributes(version: int, network: bool = False) -> bytes:
    """`struct landlock_ruleset_attr`, as long as the ABI knows it."""
    attributes = struct.pack("=Q", handled(version))
    if version >= 4:
        attributes += struct.pack("=Q", 0 if network else BIND_TCP | CONNECT_TCP)
    if version >= 6:
        attributes += struct.pack("=Q", SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL)
    return attributes


def path_beneath(access: Access, descriptor: int) -> bytes:
    """`struct landlock_path_beneath_attr`, which is packed."""
    return struct.pack("=Qi", access, descriptor)


def _grant(ruleset: int, path: Path, access: Access) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                access &= FILE
            rule = path_beneath(access, descriptor)
            syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.create_string_buffer(rule, len(rule)), 0)
        finally:
            os.close(descriptor)
