"""The network of a job of several processes: open until they are connected to each other, then closed for good.

Until then nothing but this product's code, torch and its communication library runs, and not a byte of an upload has
been read. What is left afterwards are connections between the processes of this one job: no new one can be made, none
can be taken, and nothing listens.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from worker.sandbox import seccomp

left_open = False
"""Whether this process is behind walls that still have the network open. What it starts inherits that."""


def close(connections: int) -> None:
    """Ends it for every thread of this process and what they start; without walls around it, does nothing.

    Call it once in each process of the job, when all are connected. Raises OSError, also where there are more or fewer
    than these connections: whoever else of this machine was quick enough to make one would keep it.
    """
    global left_open
    if not left_open:
        return
    _stop_listening()
    if (found := _connections()) != connections:
        raise OSError(errno.EACCES, f"there are {found} connections where the processes of the job make {connections}")
    seccomp.install(seccomp.CONNECTED, seccomp.FLAG_TSYNC)
    left_open = False


def _stop_listening() -> None:
    """Puts something that says nothing in the place of each listening socket: its owner holds on to the number.

    Whoever waits for connections would otherwise be woken by every stranger's, and could not take it.
    """
    silent, other = socket.socketpair()
    with silent, other:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # no socket, or the one that listed them
                descriptor = int(name)
                if _listens(descriptor):
                    os.dup2(silent.fileno(), descriptor, inheritable=False)


def _connections() -> int:
    """How many sockets of this process reach beyond Unix ones."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), _of(int(name)) as found:
            count += found.family != socket.AF_UNIX
    return count


def _listens(descriptor: int) -> bool:
    with _of(descriptor) as found:
        return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _of(descriptor: int) -> socket.socket:
    """The socket behind a descriptor, by one of its own. Raises OSError where there is none."""
    copied = os.dup(descriptor)
    try:
        return socket.socket(fileno=copied)
    except OSError:
        os.close(copied)
        raise
