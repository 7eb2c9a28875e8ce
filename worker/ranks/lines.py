"""Lines between the ranks of a job, for messages that are too small for gloo. Those of one host are Unix sockets.

A collective of gloo wakes four threads; two processes that are as far as each other exchange a few hundred bytes over
a socket in three microseconds, if they look for a moment before they sleep. BatchNorm does so twice a layer and step.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Mapping

LOOKS = 200  # without sleeping, for what comes at once


class Gone(ConnectionError):
    """Another process has closed its end."""


class Lines:
    """The lines of one process to all others, by their rank. For one thread at a time."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self._sockets = dict(sockets)

    def exchanged(self, mine: memoryview) -> dict[int, bytearray]:
        """Sends to all others and gives what they sent, as many bytes; raises Gone where one has ended."""
        to_send = dict.fromkeys(self._sockets, mine) if mine else {}
        received = {rank: bytearray(len(mine)) for rank in self._sockets}
        to_fill = {rank: memoryview(buffer) for rank, buffer in received.items() if buffer}
        looks = 0
        while to_send or to_fill:
            if self._moved(to_send, to_fill):
                looks = 0
            elif (looks := looks + 1) > LOOKS:
                self._sleep(to_send, to_fill)
        return received

    def _moved(self, to_send: dict[int, memoryview], to_fill: dict[int, memoryview]) -> bool:
        """Sends and receives what can be at once, and notes it; whether that was anything."""
        moved = False
        for rank in list(to_send):
            count = self._sent(rank, to_send[rank])
            moved |= _advance(to_send, rank, count)
        for rank in list(to_fill):
            count = self._received(rank, to_fill[rank])
            moved |= _advance(to_fill, rank, count)
        return moved

    def _sent(self, rank: int, rest: memoryview) -> int:
        try:
            return self._sockets[rank].send(rest, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Gone(f"process {rank} is gone") from error

    def _received(self, rank: int, rest: memoryview) -> int:
        try:
            count = self._sockets[rank].recv_into(rest, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Gone(f"process {rank} is gone") from error
        if not count:
            raise Gone(f"process {rank} is gone")
        return count

    def _sleep(self, to_send: Mapping[int, memoryview], to_fill: Mapping[int, memoryview]) -> None:
        waiting = select.poll()
        for rank, own in self._sockets.items():
            wanted = select.POLLOUT * (rank in to_send) | select.POLLIN * (rank in to_fill)
            if wanted:
                waiting.register(own, wanted)
        waiting.poll()


def _advance(rests: dict[int, memoryview], rank: int, count: int) -> bool:
    rests[rank] = rests[rank][count:]
    if not rests[rank]:
        del rests[rank]
    return count > 0


def pairs(size: int) -> list[dict[int, socket.socket]]:
    """The ends of a line between each two of `size` processes, by rank and by the other's rank."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for one in range(size):
        for other in range(one + 1, size):
            ends[one][other], ends[other][one] = socket.socketpair()
    return ends
