"""Stored bytes by their digest: whether an account needs to send them at all."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.auth import Account
from app.contract.errors import NotFound
from app.openapi import Responses, answers
from app.services import in_thread, services_of
from app.uploads.referring import held_blob

router = APIRouter(prefix="/v1/blobs", tags=["uploads"])

FOUND: Responses = {200: {"description": "They are held; Content-Length is their number."}}


@router.head("/{digest}", response_class=Response, responses=answers(FOUND, 401, 404, 503))
async def look_at_blob(request: Request, account: Account, digest: str) -> Response:
    """Whether the service holds bytes (`sha256:` and 64 hexadecimal digits) that this very account has sent before.

    Those of other accounts count as unknown.
    """
    services = services_of(request)
    sha256 = await held_blob(services, account, digest)
    if sha256 is None:
        raise NotFound("This account has uploaded no such bytes: send the file.")
    size = await in_thread(services.blobs.size, services.blobs.blob_key(sha256))
    return Response(status_code=200, headers={"Content-Length": str(size), "Cache-Control": "no-store"})
