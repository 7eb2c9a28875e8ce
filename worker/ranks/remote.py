"""Lines between ranks of different hosts, for small messages: TCP, where those of one host have Unix sockets.

A card says where a rank waits, and a secret by which those whom it calls know it: strangers are hung up on.
"""

from __future__ import annotations

import datetime
import hmac
import secrets
import socket
import sys
import time
from typing import NamedTuple

import psutil

from worker.ranks.meeting import Meeting, Place

SECRET_BYTES = 16
HANDSHAKE_SECONDS = 5.0  # for whoever has called to say who it is
CALL_SECONDS, AGAIN_SECONDS = 10.0, 0.5
NUMBER_BYTES = 4
LOST_MILLISECONDS = 60_000  # without an answer from the other host's kernel; by default it takes a quarter of an hour


class Card(NamedTuple):
    """What a rank tells the others."""

    address: str
    port: int
    secret: bytes

    def text(self) -> str:
        """As it lies in the meeting."""
        return f"{self.address} {self.port} {self.secret.hex()}"

    @classmethod
    def of(cls, text: bytes) -> Card:
        """Raises ValueError for what is no card."""
        address, port, secret = text.decode().split(" ")
        return cls(address, int(port), bytes.fromhex(secret))


class Remote:
    """Of one rank: listens from the start, and calls those before it until they answer."""

    def __init__(self, rank: int, place: Place, meeting: Meeting) -> None:
        self._rank, self._place, self._meeting = rank, place, meeting
        address = address_of(place.interface)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=place.size)
        self._card = Card(address, self._listener.getsockname()[1], secrets.token_bytes(SECRET_BYTES))
        meeting.set(_key(rank), self._card.text())

    def connected(self) -> dict[int, socket.socket]:
        """A line to each rank of another host, by its number. Raises OSError where that takes longer than the patience,
        RuntimeError where one of them lays no card."""
        own = range(self._place.first, self._place.first + self._place.processes)
        others = [rank for rank in range(self._place.size) if rank not in own]
        self._meeting.wait([_key(rank) for rank in others], datetime.timedelta(seconds=self._place.patience))
        cards = {rank: Card.of(self._meeting.get(_key(rank))) for rank in others}
        with self._listener:
            deadline = time.monotonic() + self._place.patience
            found = {rank: self._called(cards[rank], deadline) for rank in others if rank < self._rank}
            waiting = {rank for rank in others if rank > self._rank}
            while waiting:
                self._listener.settimeout(max(0.1, deadline - time.monotonic()))
                caller, _ = self._listener.accept()
                rank = _introduced(caller, cards)
                if rank in waiting:
                    found[rank] = caller
                    waiting.remove(rank)
                else:
                    caller.close()
        for line in found.values():
            line.settimeout(None)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_MILLISECONDS)
        return found

    def _called(self, card: Card, deadline: float) -> socket.socket:
        while True:
            try:
                line = socket.create_connection((card.address, card.port), CALL_SECONDS)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN_SECONDS)
                continue
            line.sendall(self._rank.to_bytes(NUMBER_BYTES, "big") + self._card.secret)
            return line


def _introduced(caller: socket.socket, cards: dict[int, Card]) -> int | None:
    """Which rank has called; None for a stranger."""
    caller.settimeout(HANDSHAKE_SECONDS)
    said = b""
    try:
        while len(said) < NUMBER_BYTES + SECRET_BYTES and (
            more := caller.recv(NUMBER_BYTES + SECRET_BYTES - len(said))
        ):
            said += more
    except OSError:
        return None
    rank, secret = int.from_bytes(said[:NUMBER_BYTES], "big"), said[NUMBER_BYTES:]
    return rank if rank in cards and hmac.compare_digest(secret, cards[rank].secret) else None


def address_of(interface: str) -> str:
    """Of a network interface of this machine, IPv4 where it has one. Raises OSError where it has none."""
    found = {one.family: one.address for one in reversed(psutil.net_if_addrs().get(interface, []))}
    address = found.get(socket.AF_INET) or found.get(socket.AF_INET6)
    if address is None:
        raise OSError(f"the network interface {interface} has no address")
    return address


def _key(rank: int) -> str:
    return f"line-{rank}"
