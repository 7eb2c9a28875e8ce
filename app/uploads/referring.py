"""Models and datasets made of bytes that are here already: a finished resumable upload, or a blob by its digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.bodies import read_json
from app.contract.blobs import Stored
from app.contract.errors import NotFound
from app.contract.records import UploadKind
from app.errors import InvalidFields
from app.identifiers import require_id
from app.pointers import violations
from app.services import Services, in_thread
from app.uploads.resuming import finished
from app.uploads.specs import checked_spec
from app.uploads.tus import SHA256

PREFIX = "sha256:"


class Reference(BaseModel):
    """Names bytes instead of sending them: `upload` or `blob`, not both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    upload: str | None = Field(None, description="The id of a resumable upload of which all bytes have come.")
    blob: str | None = Field(None, description="`sha256:` and the digest of bytes that this account has sent before.")
    filename: str | None = Field(None, description="The file's name; that of the upload by default.")
    spec: dict[str, Any] = Field(default_factory=dict, description="As in the form.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.upload is None) == (self.blob is None):
            raise ValueError("give either `upload` or `blob`")
        return self


@dataclass(frozen=True)
class Referred:
    """What a reference names."""

    stored: Stored
    filename: str | None
    spec: dict[str, Any]


async def referred(request: Request, services: Services, account: str, kind: UploadKind) -> Referred:
    """The bytes that a JSON body names.

    Raises InvalidFields, NotFound for what this account has not sent, UploadUnfinished, UploadLocked, DigestMismatch.
    """
    document = await read_json(request, services.settings.max_json_bytes)
    try:
        reference = Reference.model_validate(document)
    except ValidationError as error:
        raise InvalidFields(violations(error, document)) from None
    spec = checked_spec(kind, reference.spec)
    if reference.upload is not None:
        return await _from_upload(services, account, reference, reference.upload, spec)
    sha256 = await held_blob(services, account, reference.blob or "")
    if sha256 is None:
        raise NotFound("This account has uploaded no such bytes. Send the file itself.", pointer="/blob")
    size = await in_thread(services.blobs.size, services.blobs.blob_key(sha256))
    return Referred(Stored(sha256, size), reference.filename, spec)


async def _from_upload(
    services: Services, account: str, reference: Reference, upload_id: str, spec: dict[str, Any]
) -> Referred:
    try:
        record = await in_thread(services.store.get_resumable, account, require_id(upload_id, "upl"))
    except NotFound as error:
        raise NotFound(error.detail, pointer="/upload") from None
    record = await finished(services, record)
    assert record.sha256 is not None
    return Referred(Stored(record.sha256, record.size_bytes), reference.filename or record.filename, spec)


async def held_blob(services: Services, account: str, digest: str) -> str | None:
    """The hexadecimal SHA-256 of bytes that are here and that this account has sent itself; None for all others."""
    sha256 = digest.removeprefix(PREFIX)
    if not digest.startswith(PREFIX) or not SHA256.fullmatch(sha256):
        return None
    if not await in_thread(services.store.holds_blob, account, sha256):
        return None
    return sha256 if await in_thread(services.blobs.exists, services.blobs.blob_key(sha256)) else None
