"""Artifacts: what a job delivered, and the bytes."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from app.auth import Account
from app.conditional import digest_header, matches, wanted_range
from app.contract.errors import NotFound, PreconditionFailed, RangeNotSatisfiable
from app.contract.records import ArtifactRecord
from app.errors import answer, document
from app.identifiers import require_id
from app.openapi import BYTES, IF_NONE_MATCH, REASONS, TEXT, header, problems
from app.schemas import ArtifactView, artifact_view
from app.services import in_thread, services_of

router = APIRouter(prefix="/v1/jobs/{job_id}/artifacts", tags=["artifacts"])

HEADERS: dict[str, Any] = {
    "ETag": {"description": "The SHA-256 in hexadecimal, quoted; strong.", "schema": TEXT},
    "Repr-Digest": {"description": "The SHA-256 of the whole file (RFC 9530).", "schema": TEXT},
    "Accept-Ranges": {"description": "`bytes`.", "schema": TEXT},
    "Content-Disposition": {"description": "The file's name.", "schema": TEXT},
}
CONTENT_RANGE: dict[str, Any] = {"Content-Range": {"description": "Which bytes of how many.", "schema": TEXT}}
DOWNLOAD: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole file.",
        "headers": HEADERS,
        "content": {"application/octet-stream": {"schema": BYTES}},
    },
    206: {
        "description": "The range.",
        "headers": HEADERS | CONTENT_RANGE,
        "content": {"application/octet-stream": {"schema": BYTES}},
    },
    304: {"description": REASONS[304], "headers": HEADERS},
    **problems(401, 404, 409, 410, 412, 503),
    416: problems(416)[416] | {"headers": CONTENT_RANGE},
}
PARAMETERS: dict[str, Any] = {
    "parameters": [
        header("Range", "One range of bytes; several give the whole file.", "bytes=0-1023"),
        header("If-Range", "An ETag: the range counts only if it still holds.", '"…"'),
        header("If-Match", "An ETag: 412 if it no longer holds.", '"…"'),
        IF_NONE_MATCH,
    ]
}


@router.get("", response_model=list[ArtifactView], responses=problems(401, 404, 409, 503))
async def list_artifacts(request: Request, account: Account, job_id: str) -> list[ArtifactView]:
    """The files of a job; 409 until it has succeeded."""
    found = await in_thread(services_of(request).store.artifacts, account, require_id(job_id, "job"))
    return [artifact_view(record) for record in found]


@router.get("/{name}", response_class=Response, responses=DOWNLOAD, openapi_extra=PARAMETERS)
async def download_artifact(request: Request, account: Account, job_id: str, name: str) -> Response:
    """The bytes of a file, whole or in part."""
    return await _serve(request, account, job_id, name)


@router.head("/{name}", response_class=Response, responses=DOWNLOAD, openapi_extra=PARAMETERS)
async def look_at_artifact(request: Request, account: Account, job_id: str, name: str) -> Response:
    """The same headers without the bytes."""
    return await _serve(request, account, job_id, name)


async def _serve(request: Request, account: str, job_id: str, name: str) -> Response:
    services = services_of(request)
    if not name.isprintable():
        raise NotFound()
    record = await in_thread(services.store.artifact, account, require_id(job_id, "job"), name)
    etag = f'"{record.sha256}"'
    if request.headers.get("if-match") is not None and not matches(request.headers["if-match"], etag):
        raise PreconditionFailed("If-Match names another version than the artifact's, which never changes.")
    headers = _headers(record, etag)
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    try:
        part = wanted_range(request.headers.get("range"), request.headers.get("if-range"), etag, record.size_bytes)
    except RangeNotSatisfiable as error:
        return answer(document(error), {"Content-Range": f"bytes */{record.size_bytes}"})
    start, end = part or (0, record.size_bytes)
    headers["Content-Length"] = str(end - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{record.size_bytes}"
    status = 200 if part is None else 206
    await in_thread(services.blobs.size, record.key)  # BlobMissing now is an answer; later it would cut one off
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=record.media_type)
    return StreamingResponse(services.blobs.stream(record.key, start, end), status, headers, record.media_type)


def _headers(record: ArtifactRecord, etag: str) -> dict[str, str]:
    return {
        "ETag": etag,
        "Repr-Digest": digest_header(record.sha256),
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.name)}",
        # The bytes under this address never change.
        "Cache-Control": "private, max-age=31536000, immutable",
    }
