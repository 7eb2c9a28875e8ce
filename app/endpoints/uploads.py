"""Resumable uploads (tus 1.0.0): create, send, ask how far, terminate; and lists of them as JSON, which tus lacks."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app import schemas
from app.auth import Account
from app.bodies import content_type, refuse_encoding
from app.contract.errors import NotFound, TersorError, UploadIncomplete
from app.contract.ids import new_id
from app.contract.records import ResumableRecord
from app.identifiers import require_id
from app.openapi import BYTES, LOCATION, TEXT, Responses, answers, header
from app.pagination import DEFAULT_LIMIT, Cursor, Limit, page, position
from app.schemas import Page, ResumableView, resumable_view
from app.services import in_thread, services_of
from app.uploads import tus
from app.uploads.receiving import safe_filename
from app.uploads.resuming import receive_bytes, terminate

router = APIRouter(prefix=tus.PATH, tags=["uploads"])


def _described(names: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": TEXT} for name, text in names.items()}


STATE = _described(
    {"Upload-Offset": "How many bytes are durable.", "Upload-Expires": "When it is removed, unless more bytes come."}
)
SHAPE = _described({"Upload-Length": "How many bytes there are in all.", "Upload-Metadata": "As it was created."})
SERVICE = _described(
    {
        "Tus-Version": "`1.0.0`.",
        "Tus-Extension": "What is supported beyond the core.",
        "Tus-Max-Size": "The largest file in bytes.",
        "Tus-Checksum-Algorithm": "For Upload-Checksum.",
    }
)
RESUMABLE = header("Tus-Resumable", "The protocol's version.", tus.VERSION) | {"required": True}
OFFSET = header("Upload-Offset", "How many bytes have come before these.", "0") | {"required": True}
CHECKSUM = header("Upload-Checksum", "Of this body: an algorithm and the value in base64.", "sha256 …")
METADATA = header("Upload-Metadata", "`filename`, and `sha256` in hexadecimal; values in base64.", "filename bS5wdA==")
BODY: dict[str, Any] = {"content": {tus.MEDIA_TYPE: {"schema": BYTES}}}
CREATING = (400, 401, 412, 413, 415, 422, 429, 460, 503)
SENDING = (400, 401, 404, 409, 410, 412, 413, 415, 422, 423, 460, 503)


def _answers(success: Responses, *statuses: int) -> Responses:
    """As in openapi, with the headers that every answer of the protocol has."""
    found = answers(success, *statuses)
    version = _described({"Tus-Resumable": "The protocol's version."})
    for status, response in found.items():
        named = _described({"Tus-Version": "The versions that are supported."}) if status == 412 else {}
        response["headers"] = response.get("headers", {}) | version | named
    return found


@router.options("", status_code=204, response_class=Response, responses=_answers({204: {"headers": SERVICE}}, 401, 503))
async def describe_uploads(request: Request, account: Account) -> Response:
    """What of the protocol is supported."""
    return Response(
        status_code=204,
        headers={
            "Tus-Version": tus.VERSION,
            "Tus-Extension": tus.EXTENSIONS,
            "Tus-Max-Size": str(services_of(request).settings.max_upload_bytes),
            "Tus-Checksum-Algorithm": ",".join(tus.ALGORITHMS),
        },
    )


@router.post(
    "",
    status_code=201,
    response_class=Response,
    responses=_answers({201: {"description": "It is created.", "headers": LOCATION | STATE}}, *CREATING),
    openapi_extra={
        "parameters": [
            RESUMABLE,
            header("Upload-Length", "The file's size in bytes.", "1048576") | {"required": True},
            METADATA,
            CHECKSUM,
        ],
        "requestBody": BODY | {"description": "The first bytes, if any."},
    },
)
async def create_upload(request: Request, account: Account) -> Response:
    """Creates an upload. A promised `sha256` is verified when all bytes have come. The first may come with this."""
    tus.require_version(request)
    services = services_of(request)
    length = tus.length_of(request, services.settings.max_upload_bytes)
    metadata, values = tus.metadata_of(request)
    promised = tus.promised_sha256(values)
    with_bytes = _has_body(request)
    if with_bytes:
        tus.require_media_type(request)
        refuse_encoding(request)
    checksum = tus.checksum_of(request)
    record = await in_thread(
        services.store.add_resumable,
        account,
        new_id("upl"),
        safe_filename(tus.filename_in(values)),
        metadata,
        length,
        promised,
        services.settings.upload_expiry_seconds,
        services.settings.max_open_uploads,
    )
    if with_bytes:
        try:
            record = await receive_bytes(request, services, record, 0, checksum)
        except UploadIncomplete:
            raise  # the client knows nothing of it yet, but finds it by the digest that it promised
        except TersorError:
            with contextlib.suppress(NotFound):  # bytes of another digest than was promised have ended it already
                await terminate(services, record)
            raise
    headers = {"Location": f"{tus.PATH}/{record.id}"} | tus.state_of(record)
    return Response(status_code=201, headers=headers)


@router.head(
    "/{upload_id}",
    response_class=Response,
    responses=_answers({200: {"headers": STATE | SHAPE}}, 401, 404, 412, 503),
    openapi_extra={"parameters": [RESUMABLE]},
)
async def look_at_upload(request: Request, account: Account, upload_id: str) -> Response:
    """How far an upload is: where to go on."""
    tus.require_version(request)
    record = await _find(request, account, upload_id)
    shape = {"Upload-Length": str(record.size_bytes)}
    if record.metadata:
        shape["Upload-Metadata"] = record.metadata
    return Response(status_code=200, headers=tus.state_of(record) | shape)


@router.patch(
    "/{upload_id}",
    status_code=204,
    response_class=Response,
    responses=_answers({204: {"description": "All of it is durable.", "headers": STATE}}, *SENDING),
    openapi_extra={"parameters": [RESUMABLE, OFFSET, CHECKSUM], "requestBody": BODY | {"required": True}},
)
async def append_to_upload(request: Request, account: Account, upload_id: str) -> Response:
    """Sends bytes. What comes of a body that breaks off is kept; with Upload-Checksum only the whole body is."""
    tus.require_version(request)
    tus.require_media_type(request)
    refuse_encoding(request)
    offset, checksum = tus.offset_of(request), tus.checksum_of(request)
    record = await _find(request, account, upload_id)
    record = await receive_bytes(request, services_of(request), record, offset, checksum)
    return Response(status_code=204, headers=tus.state_of(record))


@router.delete(
    "/{upload_id}",
    status_code=204,
    response_class=Response,
    responses=_answers({204: {"description": "It is gone."}}, 401, 404, 412, 423, 503),
    openapi_extra={"parameters": [RESUMABLE]},
)
async def terminate_upload(request: Request, account: Account, upload_id: str) -> Response:
    """Ends an upload. Models and datasets that were made from it keep their bytes."""
    tus.require_version(request)
    await terminate(services_of(request), await _find(request, account, upload_id))
    return Response(status_code=204)


@router.get("/{upload_id}", response_model=ResumableView, responses=_answers({200: {}}, 401, 404, 503))
async def get_upload(request: Request, account: Account, upload_id: str) -> Response:
    """An upload."""
    return schemas.answer(resumable_view(await _find(request, account, upload_id)))


@router.get("", response_model=Page[ResumableView], responses=_answers({200: {}}, 400, 401, 503))
async def list_uploads(
    request: Request,
    account: Account,
    sha256: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$", description="Only those of this digest.")] = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Response:
    """The account's uploads, newest first: a client that was stopped finds the one to go on with by its digest."""
    below = position(cursor, "upl")
    found = await in_thread(services_of(request).store.list_resumables, account, below, limit + 1, sha256)
    shown, following = page(found, limit)
    return schemas.answer(Page[ResumableView](items=tuple(map(resumable_view, shown)), next=following))


async def _find(request: Request, account: str, upload_id: str) -> ResumableRecord:
    return await in_thread(services_of(request).store.get_resumable, account, require_id(upload_id, "upl"))


def _has_body(request: Request) -> bool:
    length = request.headers.get("content-length", "0").strip()
    return "transfer-encoding" in request.headers or content_type(request) == tus.MEDIA_TYPE or length not in ("", "0")
