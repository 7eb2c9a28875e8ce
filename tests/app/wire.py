"""A proxy between client and service that counts what is sent, and cuts connections where it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PIECE = 256 << 10


@dataclass
class Sent:
    """One PATCH: where it began, how many of its bytes went through, and what had been acknowledged before it."""

    offset: int
    acknowledged: int
    count: int = 0

    @property
    def sent_twice(self) -> int:
        """Bytes of it that had been acknowledged already."""
        return max(0, min(self.acknowledged, self.offset + self.count) - self.offset)


@dataclass
class Wire:
    """`cuts` are the numbers of forwarded bytes, over all PATCH requests, at which the connection breaks."""

    target: int
    cuts: Sequence[int] = ()
    sent: list[Sent] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    acknowledged: int = 0
    broken: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self._left = sorted(self.cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as service:
            received, answered = bytearray(), bytearray()
            while head := _head(client, received):
                method = head.partition(b" ")[0].decode()
                self.requests.append(" ".join(head.split(b"\r\n")[0].decode().split(" ")[:2]))
                service.sendall(head)
                length = int(_header(head, b"content-length") or 0)
                if not self._forward(method, head, client, service, received, length):
                    return
                if not self._answer(method, client, service, answered):
                    return

    def _forward(
        self, method: str, head: bytes, client: socket.socket, service: socket.socket, received: bytearray, length: int
    ) -> bool:
        """Passes a body on; False where the connection is cut."""
        note = Sent(int(_header(head, b"upload-offset") or 0), self.acknowledged)
        if method == "PATCH":
            self.sent.append(note)
        while length:
            piece = bytes(received[:length]) or client.recv(min(PIECE, length))
            del received[: len(piece)]
            if not piece:
                return False
            cut = method == "PATCH" and self._left and self.total + len(piece) >= self._left[0]
            if cut:
                piece = piece[: self._left[0] - self.total]
            try:
                service.sendall(piece)
            except OSError:
                return True  # the service takes no more: it has answered
            length -= len(piece)
            if method == "PATCH":
                note.count += len(piece)
                self.total += len(piece)
            if cut:
                self._left.pop(0)
                self.broken += 1
                return False
        return True

    def _answer(self, method: str, client: socket.socket, service: socket.socket, answered: bytearray) -> bool:
        head = _head(service, answered)
        if not head:
            return False
        offset = _header(head, b"upload-offset")
        if offset is not None:
            self.acknowledged = max(self.acknowledged, int(offset))
        client.sendall(head)
        length = 0 if method == "HEAD" else int(_header(head, b"content-length") or 0)
        while length:
            piece = bytes(answered[:length]) or service.recv(min(PIECE, length))
            del answered[: len(piece)]
            client.sendall(piece)
            length -= len(piece)
        return _header(head, b"connection") != b"close"


@contextlib.contextmanager
def wire(target: str, cuts: Sequence[int] = ()) -> Iterator[Wire]:
    """A proxy to the service at this URL."""
    made = Wire(int(target.rpartition(":")[2]), cuts)
    try:
        yield made
    finally:
        made.close()


def _head(source: socket.socket, received: bytearray) -> bytes:
    """A message's head; what came behind it stays in `received`."""
    while b"\r\n\r\n" not in received:
        piece = source.recv(PIECE)
        if not piece:
            return b""
        received += piece
    end = received.index(b"\r\n\r\n") + 4
    head = bytes(received[:end])
    del received[:end]
    return head


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip()
    return None
