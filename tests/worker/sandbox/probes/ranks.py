"""What the processes of a training in several can do once they are connected: each of two tries the same."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
from typing import Any

import torch

from app.contract.errors import JobFailed, Problem
from tests.worker.sandbox.probes.request import ProbeRequest
from worker.ranks import crew as crews
from worker.ranks.crew import crew
from worker.ranks.meeting import Place
from worker.ranks.ranks import Ranks


def both(request: ProbeRequest, probe: str, *arguments: Any) -> str:
    """What another probe says in each of the two, and the sum that they can still form together."""
    return _in_each(Place(2, request.work), request, probe, arguments)


def apart(request: ProbeRequest, probe: str, *arguments: Any) -> str:
    """The same for one process on each of two hosts, which are both this one."""
    if os.fork():
        return _in_each(Place(1, request.work, 0, 2), request, probe, arguments)
    _in_each(Place(1, request.work, 1, 2), request, probe, arguments)
    os._exit(0)


def _in_each(place: Place, request: ProbeRequest, probe: str, arguments: tuple[Any, ...]) -> str:
    module, name = probe.split(".")
    work = getattr(importlib.import_module(f"tests.worker.sandbox.probes.{module}"), name)

    def tried(ranks: Ranks) -> str:
        try:
            said = work(request, *arguments)
        except OSError as error:
            said = f"refused: {errno.errorcode[error.errno or 0]}"
        found = ranks.listed("reached" if said is None else str(said))
        return ", ".join([*found, str(int(ranks.total(torch.tensor([1 + ranks.rank]))))])

    def follow(ranks: Ranks) -> None:
        tried(ranks)

    with crew(place, follow, _problem) as ranks:
        return tried(ranks)


def _problem(error: Exception) -> Problem:
    return JobFailed(str(error)).problem()


def listening(request: ProbeRequest) -> str:
    """How many of its sockets take connections."""
    return str(sum(map(_listens, _tcp())))


def connected(request: ProbeRequest) -> str:
    """Whom its sockets of TCP are connected to."""
    return " ".join(sorted({found.getpeername()[0] for found in _tcp()}))


def connections(request: ProbeRequest) -> str:
    """How many of its sockets of TCP are connected."""
    return str(sum(not _listens(found) for found in _tcp()))


def send_elsewhere(request: ProbeRequest, port: int) -> None:
    """A send that connects, on a connection that it has."""
    _connection().sendto(b"secret", socket.MSG_FASTOPEN, ("127.0.0.1", port))


def connect_elsewhere(request: ProbeRequest, port: int) -> None:
    """A second connect on a connection that it has."""
    _connection().connect(("127.0.0.1", port))


def _connection() -> socket.socket:
    return next(found for found in _tcp() if not _listens(found))


def _listens(found: socket.socket) -> bool:
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _tcp() -> list[socket.socket]:
    """Of this process, by descriptors of their own."""
    made = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket
            made.append(socket.socket(fileno=os.dup(int(name))))
    return [found for found in made if found.family in (socket.AF_INET, socket.AF_INET6)]


def with_a_stranger(request: ProbeRequest, port: int) -> None:
    """A connection is there before the network closes."""
    with socket.create_connection(("127.0.0.1", port)), crew(Place(2, request.work), lambda ranks: None, _problem):
        pass


def alone(request: ProbeRequest) -> None:
    """The other process ends before it has a connection."""

    def end(*arguments: Any) -> None:
        os._exit(0)

    ours = crews._connected
    crews._connected = lambda rank, *rest: end() if rank else ours(rank, *rest)  # type: ignore[func-returns-value,return-value]
    with crew(Place(2, request.work, patience=1.0), end, _problem):
        pass
