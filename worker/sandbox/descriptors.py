"""What a child inherits open: its pipe and the standard streams, and nothing that reaches into the worker."""

from __future__ import annotations

import contextlib
import os
import sys
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

STANDARD = (0, 1, 2)


def keep_only(*kept: int) -> None:
    """Closes all but the standard streams and these descriptors.

    A child of the fork server holds the server's lifeline, a word on which ends the server and every job, and a pipe
    to the worker's resource tracker, which believes whatever it reads. Processes that the job starts get a tracker of
    their own.
    """
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
    forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    forkserver._forkserver._forkserver_address = None  # type: ignore[attr-defined]
    for name in os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"):
        descriptor = int(name)
        if descriptor not in STANDARD and descriptor not in kept:
            with contextlib.suppress(OSError):  # the one that listed them is closed already
                os.close(descriptor)


def redirect_streams(log: Path) -> None:
    """Nothing to read, and whatever the job prints in a file of the attempt: bounded, and gone with it.

    Leaves descriptors open that `keep_only` closes.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, standard in zip((nothing, printed, printed), STANDARD, strict=True):
        os.dup2(descriptor, standard)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing gave it another descriptor
