"""What the endpoints of models and datasets share."""

from __future__ import annotations

from fastapi import Request

from app.contract.records import UploadKind, UploadRecord
from app.contract.states import UploadStatus
from app.identifiers import require_id
from app.pagination import page, position
from app.prefer import hold, preferred_wait
from app.services import in_thread, services_of

PREFIXES: dict[UploadKind, str] = {"model": "mdl", "dataset": "dst"}


async def inspected(request: Request, record: UploadRecord) -> tuple[UploadRecord, int | None]:
    """The record, after its inspection where the client is ready to wait, and the seconds that it is ready for."""
    seconds = preferred_wait(request)
    if seconds is None or record.status is not UploadStatus.INSPECTING:
        return record, seconds
    store, latest = services_of(request).store, [record]

    def settled() -> bool:
        latest[0] = store.get_upload(record.account, record.id)
        return latest[0].status is not UploadStatus.INSPECTING

    await hold(request, seconds, settled)
    return latest[0], seconds


async def find(request: Request, account: str, kind: UploadKind, id: str) -> UploadRecord:
    """A record by its id; raises NotFound."""
    return await in_thread(services_of(request).store.get_upload, account, require_id(id, PREFIXES[kind]))


async def list_page(
    request: Request, account: str, kind: UploadKind, cursor: str | None, limit: int, status: UploadStatus | None
) -> tuple[list[UploadRecord], str | None]:
    """One page of records, newest first, and the cursor of the next one."""
    below = position(cursor, PREFIXES[kind])
    found = await in_thread(services_of(request).store.list_uploads, account, kind, below, limit + 1, status)
    shown, following = page(found, limit)
    return list(shown), following
