"""Large files, sent so that a cut costs little: resumable uploads (tus), resumed without being asked."""

from __future__ import annotations

import base64
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx

from app.client.transport import ClientError, Document, send

CHUNK_BYTES = 1 << 20
# One request carries at most this much: a proxy that buffers requests, and breaks, costs no more.
REQUEST_BYTES = 1 << 30
# Without a byte of progress for this long the service counts as lost.
PATIENCE_SECONDS = 600.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 10.0
# No answer, an upload in use, and what the service or a proxy says while a part of it restarts.
PASSING = {0, 423, 502, 503, 504}
VERSION = {"Tus-Resumable": "1.0.0"}

# Bytes sent so far, and bytes in all. After a cut the first figure goes back to what the service has.
OnProgress = Callable[[int, int], None]
Result = TypeVar("Result")


class Patience:
    """Pauses that grow between tries, until there is progress or no patience left."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """There is progress."""
        self._pause, self._end = FIRST_PAUSE_SECONDS, time.monotonic() + PATIENCE_SECONDS

    def spend(self, error: ClientError) -> None:
        """Waits a little after an error that passes; raises it where it does not, or has not for too long."""
        passes = error.status in PASSING or error.code == "offset_mismatch"
        if not passes or time.monotonic() > self._end:
            raise error
        time.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that clients do not come in waves
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


class Sender:
    """Brings one file to the service. Raises ClientError."""

    def __init__(self, http: httpx.Client, path: Path, on_progress: OnProgress | None) -> None:
        self._http, self._path = http, path
        self._on_progress = on_progress or (lambda sent, size: None)
        self._stat = path.stat()
        self._size = self._stat.st_size
        self._patience = Patience()

    def send_and_use(self, use: Callable[[Document], Result]) -> Result:
        """What `use` makes of the reference (`blob` or `upload`) to the bytes, which are at the service by then."""
        sha256 = self._digest()
        self._patience.renew()
        for find in (self._held, self._uploaded):
            try:
                return self._use(find(sha256), use)
            except ClientError as error:
                # Not sent yet; or what was there has expired, or was broken on its way and discarded.
                if error.status not in (404, 410) and error.code != "digest_mismatch":
                    raise
        return self._use(self._uploaded(sha256), use)

    def _use(self, reference: Document, use: Callable[[Document], Result]) -> Result:
        return self._insist(lambda: use(reference))

    def _held(self, sha256: str) -> Document:
        """A reference to bytes that the service holds already."""
        self._insist(lambda: send(self._http, "HEAD", f"/v1/blobs/sha256:{sha256}"))
        return {"blob": f"sha256:{sha256}"}

    def _uploaded(self, sha256: str) -> Document:
        """A reference to an upload that is complete when this returns: an earlier one, or a new one."""
        page = self._insist(lambda: send(self._http, "GET", "/v1/uploads", params={"sha256": sha256})).json()
        begun = [upload for upload in page["items"] if upload["size_bytes"] == self._size]
        if begun:
            best = max(begun, key=lambda upload: (upload["finished"], upload["offset"]))
            url = f"/v1/uploads/{best['id']}"
        else:
            url = self._insist(lambda: self._create(sha256))
        self._send_rest(url)
        return {"upload": url.rpartition("/")[2]}

    def _create(self, sha256: str) -> str:
        metadata = {"filename": self._path.name, "sha256": sha256}
        encoded = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in metadata.items())
        headers = VERSION | {"Upload-Length": str(self._size), "Upload-Metadata": encoded}
        return str(send(self._http, "POST", "/v1/uploads", headers=headers).headers["location"])

    def _send_rest(self, url: str) -> None:
        offset = self._offset(url)
        while True:
            self._on_progress(offset, self._size)
            if offset == self._size:
                return
            try:
                reached = self._patch(url, offset)
            except ClientError as error:
                self._patience.spend(error)
                reached = self._offset(url)
            if reached > offset:
                self._patience.renew()
            offset = reached

    def _offset(self, url: str) -> int:
        return int(self._insist(lambda: send(self._http, "HEAD", url, headers=VERSION)).headers["upload-offset"])

    def _patch(self, url: str, offset: int) -> int:
        now = self._path.stat()
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            detail = f"{self._path} was changed while it was being sent. Send it again."
            raise ClientError({"code": "file_changed", "detail": detail, "retryable": True}, 400)
        end = min(offset + REQUEST_BYTES, self._size)
        headers = VERSION | {
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(end - offset),
            "Upload-Offset": str(offset),
        }
        answer = send(self._http, "PATCH", url, content=self._bytes(offset, end), headers=headers)
        return int(answer.headers["upload-offset"])

    def _bytes(self, offset: int, end: int) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            file.seek(offset)
            while offset < end and (chunk := file.read(min(CHUNK_BYTES, end - offset))):
                yield chunk
                offset += len(chunk)
                self._on_progress(offset, self._size)

    def _digest(self) -> str:
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _insist(self, call: Callable[[], Result]) -> Result:
        while True:
            try:
                return call()
            except ClientError as error:
                self._patience.spend(error)
