"""An upload: bytes go to the blob store while they come, and nothing is kept unless all of the request is right."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from app.bodies import content_type, parse_json, pieces, refuse_encoding, refuse_length
from app.contract.blobs import Stored
from app.contract.errors import BlobMissing, InvalidRequest, ServiceUnavailable, UnsupportedMediaType
from app.contract.ids import new_id
from app.contract.records import UploadKind, UploadRecord
from app.services import Services, in_thread, services_of
from app.uploads.multipart import Form
from app.uploads.referring import referred
from app.uploads.specs import checked_spec

MAX_FILENAME = 255  # what file systems take
FORM_OVERHEAD_BYTES = 64 << 10  # boundaries and part headers around the file and the spec


class Upload:
    """One request's file. `spec` is known once `chunks` has ended; both come from the query or from the form."""

    def __init__(self, request: Request, services: Services, kind: UploadKind) -> None:
        self._request = request
        self._limits = services.settings
        self._kind = kind
        self.filename = request.query_params.get("filename")
        self.spec = self._checked(request.query_params.get("spec"))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes; raises where anything about the request is wrong, at the latest after the last one."""
        size = 0
        async for chunk in self._parts() if self._is_form() else self._raw():
            size += len(chunk)
            yield chunk
        if not size:
            raise InvalidRequest("The file is empty: it has 0 bytes. Send the file itself.")

    def refuse_early(self) -> None:
        """Raises what the request's head alone shows to be wrong."""
        refuse_encoding(self._request)
        refuse_length(self._request, self._max_body())
        if content_type(self._request).startswith("multipart/") and not self._is_form():
            raise UnsupportedMediaType()

    def _is_form(self) -> bool:
        return content_type(self._request) == "multipart/form-data"

    def _max_body(self) -> int:
        if not self._is_form():
            return self._limits.max_upload_bytes
        return self._limits.max_upload_bytes + self._limits.max_json_bytes + FORM_OVERHEAD_BYTES

    def _raw(self) -> AsyncIterator[bytes]:
        return pieces(self._request, self._max_body())

    async def _parts(self) -> AsyncIterator[bytes]:
        form = Form(self._request.headers["content-type"], self._limits.max_json_bytes)
        async for piece in pieces(self._request, self._max_body()):
            for chunk in form.feed(piece):
                yield chunk
        form.finish()
        self.filename = self.filename or form.filename
        if form.spec is not None:
            self.spec = self._checked(form.spec)

    def _checked(self, text: str | bytes | None) -> dict[str, Any]:
        return checked_spec(self._kind, {} if text is None or not text.strip() else parse_json(text, "`spec`"))


async def receive(request: Request, account: str, kind: UploadKind) -> UploadRecord:
    """Stores the file of a request, or finds the one that it names, records it, and rings for its inspection.

    Bytes whose record cannot be written stay under their digest, where the client's next try finds them.
    """
    services = services_of(request)
    if content_type(request) == "application/json":
        found = await referred(request, services, account, kind)
        record = await _record(services, account, kind, found.filename, found.stored, found.spec)
    else:
        upload = Upload(request, services, kind)
        upload.refuse_early()
        stored = await services.blobs.ingest(upload.chunks(), services.settings.max_upload_bytes)
        try:
            record = await _record(services, account, kind, upload.filename, stored, upload.spec)
        except BlobMissing:  # the same bytes were rejected, and deleted, for someone else in this very moment
            raise ServiceUnavailable("The file could not be kept. Send it again.") from None
        services.metrics.uploaded.labels(kind).inc(stored.size_bytes)
    services.ring(record.id)
    return record


async def _record(
    services: Services, account: str, kind: UploadKind, filename: str | None, stored: Stored, spec: dict[str, Any]
) -> UploadRecord:
    key = services.blobs.blob_key(stored.sha256)
    return await in_thread(
        services.store.add_upload,
        account,
        kind,
        new_id("mdl" if kind == "model" else "dst"),
        safe_filename(filename),
        stored.sha256,
        stored.size_bytes,
        spec,
        lambda: services.blobs.exists(key),
    )


def safe_filename(name: str | None) -> str:
    """The last part of a path, without control characters, at most 255 characters long; `upload` where none is left."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in last if character.isprintable()).strip()
    return printable[:MAX_FILENAME] if printable.strip(".") else "upload"
