"""A typed client of the HTTP API, for programs and for the command line. Blocking; files stream from and to disk."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx

from app.client.sending import OnProgress, Patience, Sender
from app.client.transport import ClientError, Document, reachable, require, send

# Larger files are sent as resumable uploads.
RESUMABLE_BYTES = 64_000_000
CHUNK_BYTES = 1 << 20
# One request of `wait` is held by the service for this long at most.
WAIT_SECONDS = 30
CONNECT_SECONDS = 10.0
# No service that lives takes nothing of a body for so long.
TAKE_SECONDS = 60.0
# Longer than the service holds an answer, and than it takes to make a large upload durable.
ANSWER_SECONDS = 300.0
FINAL_STATES = ("succeeded", "failed", "cancelled")


class Client:
    """One service and one API key. Every method raises ClientError."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, write=TAKE_SECONDS),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def upload_model(self, path: Path, spec: Document | None = None, on_progress: OnProgress | None = None) -> Document:
        """Uploads a model's file; its inspection has only begun when this returns.

        A file over RESUMABLE_BYTES is not sent again where the service holds it, and what is cut off goes on by
        itself, also after this program was killed and started again. For such a file `on_progress` is called with the
        bytes sent and the bytes in all.
        """
        return self._upload("/v1/models", path, spec, on_progress)

    def upload_dataset(
        self, path: Path, spec: Document | None = None, on_progress: OnProgress | None = None
    ) -> Document:
        """The same for a dataset's file."""
        return self._upload("/v1/datasets", path, spec, on_progress)

    def model(self, id: str, wait: int = 0) -> Document:
        """A model; with `wait`, after its inspection or so many seconds."""
        return self._json("GET", f"/v1/models/{id}", headers=_prefer(wait))

    def dataset(self, id: str, wait: int = 0) -> Document:
        """A dataset; with `wait`, after its inspection or so many seconds."""
        return self._json("GET", f"/v1/datasets/{id}", headers=_prefer(wait))

    def submit(self, spec: Document, idempotency_key: str | None = None) -> Document:
        """Submits a job."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._json("POST", "/v1/jobs", json=spec, headers=headers)

    def dry_run(self, spec: Document) -> Document:
        """What a job would do, how long it would take, and what would come of it; nothing is submitted."""
        return self._json("POST", "/v1/jobs", params={"dry_run": True}, json=spec)

    def job(self, id: str) -> Document:
        """A job as it is now."""
        return self._json("GET", f"/v1/jobs/{id}")

    def wait(self, id: str, on_change: Callable[[Document], None] | None = None) -> Document:
        """The job once it has ended; `on_change` is called with it now and after every change.

        Once it has answered, a service that falls silent for a while is waited for.
        """
        headers: dict[str, str] = {}
        patience = Patience()
        while True:
            try:
                answer = self._send("GET", f"/v1/jobs/{id}", headers=headers)
            except ClientError as error:
                if not headers:
                    raise
                patience.spend(error)
                continue
            patience.renew()
            if answer.status_code == httpx.codes.OK:
                job: Document = answer.json()
                if on_change is not None:
                    on_change(job)
                if job["state"] in FINAL_STATES:
                    return job
                headers = {"If-None-Match": answer.headers["etag"]} | _prefer(WAIT_SECONDS)

    def cancel(self, id: str) -> Document:
        """Asks for the end of a job."""
        return self._json("POST", f"/v1/jobs/{id}/cancel")

    def report(self, id: str) -> Document:
        """What was measured; refused until the job has succeeded."""
        return self._json("GET", f"/v1/jobs/{id}/report")

    def artifacts(self, id: str) -> list[Document]:
        """The files that the job delivered."""
        found: list[Document] = self._send("GET", f"/v1/jobs/{id}/artifacts").json()
        return found

    def download(self, id: str, name: str, folder: Path) -> Path:
        """Writes an artifact into a folder, under its name once its SHA-256 is right, and gives its path."""
        target = folder / Path(name).name
        partial = target.with_name(f"{target.name}.part")
        try:
            with reachable(), self._http.stream("GET", f"/v1/jobs/{id}/artifacts/{name}") as answer:
                if answer.is_error:
                    answer.read()
                require(answer)
                _write(answer, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def _upload(self, url: str, path: Path, spec: Document | None, on_progress: OnProgress | None) -> Document:
        if path.stat().st_size > RESUMABLE_BYTES:
            named: Document = {"filename": path.name, "spec": spec or {}}
            return Sender(self._http, path, on_progress).send_and_use(
                lambda reference: self._json("POST", url, json=reference | named)
            )
        with path.open("rb") as file:
            if spec is not None:  # in a form: an architecture may be too long for the query
                form = {"files": {"file": (path.name, file)}, "data": {"spec": json.dumps(spec)}}
                return self._json("POST", url, **form)
            size = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
            return self._json("POST", url, params={"filename": path.name}, content=_chunks(file), headers=size)

    def _json(self, method: str, url: str, **request: Any) -> Document:
        document: Document = self._send(method, url, **request).json()
        return document

    def _send(self, method: str, url: str, **request: Any) -> httpx.Response:
        return send(self._http, method, url, **request)


def _write(answer: httpx.Response, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in answer.iter_raw(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    received = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    if received != answer.headers["repr-digest"]:
        detail = f"The bytes have the digest {received}, announced was {answer.headers['repr-digest']}: try again."
        raise ClientError({"code": "digest_mismatch", "detail": detail, "retryable": True}, answer.status_code)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _prefer(seconds: int) -> dict[str, str]:
    return {"Prefer": f"wait={seconds}"} if seconds else {}
