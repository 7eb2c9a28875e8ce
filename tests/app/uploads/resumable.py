"""A tus client of few lines, for tests of the protocol."""

from __future__ import annotations

import base64
import hashlib
import socket
from typing import Any

import httpx

VERSION = {"Tus-Resumable": "1.0.0"}
OCTETS = VERSION | {"Content-Type": "application/offset+octet-stream"}


def metadata(**values: str | bytes) -> dict[str, str]:
    """The header for these values."""
    raw = {key: value if isinstance(value, bytes) else value.encode() for key, value in values.items()}
    return {"Upload-Metadata": ",".join(f"{key} {base64.b64encode(value).decode()}" for key, value in raw.items())}


def promise(data: bytes, filename: str = "m.bin") -> dict[str, str]:
    """Metadata with the digest that the whole shall have."""
    return metadata(filename=filename, sha256=hashlib.sha256(data).hexdigest())


def checksum(algorithm: str, data: bytes) -> dict[str, str]:
    return {"Upload-Checksum": f"{algorithm} {base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}"}


def create(http: httpx.Client, size: int, headers: dict[str, str] | None = None) -> str:
    """The URL of a new upload."""
    answer = http.post("/v1/uploads", headers=VERSION | {"Upload-Length": str(size)} | (headers or {}))
    assert answer.status_code == 201, answer.text
    return str(answer.headers["location"])


def patch(
    http: httpx.Client, url: str, offset: int, data: Any, headers: dict[str, str] | None = None
) -> httpx.Response:
    return http.patch(url, content=data, headers=OCTETS | {"Upload-Offset": str(offset)} | (headers or {}))


def offset_of(http: httpx.Client, url: str) -> int:
    answer = http.head(url, headers=VERSION)
    assert answer.status_code == 200, answer.status_code
    return int(answer.headers["upload-offset"])


def finished(http: httpx.Client, data: bytes, headers: dict[str, str] | None = None) -> str:
    """The id of an upload that has come in one piece."""
    url = create(http, len(data), headers)
    assert patch(http, url, 0, data).status_code == 204
    return url.rpartition("/")[2]


class Cut:
    """A PATCH over a socket of its own, which sends as much as it is told and no more."""

    def __init__(self, base: str, url: str, offset: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(base.rpartition(":")[2])), timeout=30)
        head = OCTETS | {"Host": "localhost", "Upload-Offset": str(offset), "Content-Length": str(length)}
        lines = "".join(f"{name}: {value}\r\n" for name, value in (head | (headers or {})).items())
        self.socket.sendall(f"PATCH {url} HTTP/1.1\r\n{lines}\r\n".encode())

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> bytes:
        """The answer's head."""
        found = b""
        while b"\r\n\r\n" not in found and (piece := self.socket.recv(65536)):
            found += piece
        return found
