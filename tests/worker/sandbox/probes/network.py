"""Ways out of the machine, and into the services on it."""

from __future__ import annotations

import socket

from tests.worker.sandbox.probes.request import ProbeRequest


def connect_tcp(request: ProbeRequest, port: int) -> None:
    socket.create_connection(("127.0.0.1", port), 5).close()


def send_udp(request: ProbeRequest, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"secret", ("127.0.0.1", port))


def listen_tcp(request: ProbeRequest) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()


def connect_unix(request: ProbeRequest, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def send_unix(request: ProbeRequest, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(b"word", path)


def send_from_a_pair(request: ProbeRequest, path: str) -> None:
    """A datagram socket of a connected pair may still send to other addresses."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.sendto(b"word", path)


def open_socket(request: ProbeRequest, family: int, kind: int, protocol: int) -> None:
    socket.socket(family, kind, protocol).close()
