"""Privileges that a job never needs: root's, and those that a program on disk would bring along."""

from __future__ import annotations

import contextlib
import ctypes
import struct

from worker.sandbox.kernel import capget, capset, prctl

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
CAPABILITY_VERSION_3 = 0x20080522  # two words of 32 bits for each set
CAP_DAC_READ_SEARCH = 2
CAPABILITIES = 64  # more than there are


def drop(keep_reading: bool) -> None:
    """Drops every capability for good: programs that carry some, or that root starts, bring none.

    With `keep_reading`, the one to read any file stays where it was held: the interpreter may lie in a folder that only
    its owner and root enter, and Landlock decides what is read. The user stays the same, since the interpreter and the
    scratch folder are often nobody else's. Raises OSError.
    """
    kept = 1 << CAP_DAC_READ_SEARCH if keep_reading else 0
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    # Refused past the last capability, and to those who hold none and so have none to lose.
    with contextlib.suppress(OSError):
        for capability in range(CAPABILITIES):
            if not kept >> capability & 1:
                prctl(PR_CAPBSET_DROP, capability)
    _keep(kept)


def _keep(kept: int) -> None:
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), 8)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: the low words, then the high ones
    capget(header, sets)
    held = kept & struct.unpack("=6I", sets.raw)[1]
    sets.raw = struct.pack("=6I", held, held, 0, 0, 0, 0)
    capset(header, sets)
