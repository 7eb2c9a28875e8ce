"""Resumable uploads: how far each one is, who sends, and when it expires. What the bytes are is the blob store's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Update, and_, delete, func, insert, or_, select, update

from app.contract.errors import NotFound, TooManyUploads, UploadLocked
from app.contract.records import ResumableRecord
from app.contract.store import rows
from app.contract.store.base import StoreBase
from app.contract.store.uploads import is_in_use
from app.contract.tables import resumable_uploads

COLUMNS = resumable_uploads.c


class Resumables(StoreBase):
    """The statements on `resumable_uploads`. Writes of a request that lost its hold are refused with UploadLocked."""

    def add_resumable(
        self,
        account: str,
        id: str,
        filename: str,
        metadata: str,
        size_bytes: int,
        promised_sha256: str | None,
        expiry_seconds: float,
        max_open: int,
    ) -> ResumableRecord:
        """A new upload without bytes. Raises TooManyUploads where the account has `max_open` unfinished ones."""
        now = self._now()
        values = {
            "id": id,
            "account": account,
            "filename": filename,
            "upload_metadata": metadata,
            "size_bytes": size_bytes,
            "received": 0,
            "promised_sha256": promised_sha256,
            "finished": False,
            "attempt": 0,
            "created_at": now,
            "expires_at": now + timedelta(seconds=expiry_seconds),
        }
        unfinished = and_(COLUMNS.account == account, ~COLUMNS.finished, COLUMNS.expires_at > now)
        with self._write() as connection:
            self._lock(connection, f"uploads of {account}")
            count = connection.execute(select(func.count()).where(unfinished)).scalar_one()
            if count >= max_open:
                raise TooManyUploads(f"This account has {count} unfinished uploads. Finish or terminate one of them.")
            row = connection.execute(insert(resumable_uploads).values(values).returning(resumable_uploads)).one()
        return rows.resumable(row)

    def get_resumable(self, account: str, id: str) -> ResumableRecord:
        """Raises NotFound, also where it has expired or belongs to another account."""
        query = select(resumable_uploads).where(
            COLUMNS.id == id, COLUMNS.account == account, COLUMNS.expires_at > self._now()
        )
        with self._read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _missing(id)
        return rows.resumable(row)

    def list_resumables(
        self, account: str, cursor_id: str | None, limit: int, sha256: str | None = None
    ) -> list[ResumableRecord]:
        """Newest first; only ids below `cursor_id`, and only those whose bytes have this digest, or promise to."""
        query = select(resumable_uploads).where(COLUMNS.account == account, COLUMNS.expires_at > self._now())
        if cursor_id is not None:
            query = query.where(COLUMNS.id < cursor_id)
        if sha256 is not None:
            query = query.where(or_(COLUMNS.promised_sha256 == sha256, COLUMNS.sha256 == sha256))
        with self._read() as connection:
            return [rows.resumable(row) for row in connection.execute(query.order_by(COLUMNS.id.desc()).limit(limit))]

    def take_resumable(self, id: str, lease_seconds: float, force: bool) -> ResumableRecord:
        """Holds an upload for this request; every earlier holder is fenced off.

        Raises UploadLocked while another request holds it, unless `force` (the caller knows that there is none), and
        NotFound.
        """
        alive = COLUMNS.expires_at > self._now()
        with self._write() as connection:
            row = connection.execute(self._hold(id, lease_seconds, force).where(alive)).one_or_none()
            if row is None and connection.execute(select(COLUMNS.id).where(COLUMNS.id == id, alive)).first() is None:
                raise _missing(id)
        if row is None:
            raise UploadLocked()
        return rows.resumable(row)

    def take_expired(self, id: str, lease_seconds: float, force: bool) -> ResumableRecord | None:
        """Holds an upload that has expired, in order to remove it; None where it is held, alive or gone."""
        expired = COLUMNS.expires_at <= self._now()
        with self._write() as connection:
            row = connection.execute(self._hold(id, lease_seconds, force).where(expired)).one_or_none()
        return None if row is None else rows.resumable(row)

    def _hold(self, id: str, lease_seconds: float, force: bool) -> Any:
        now = self._clock()
        free: list[ColumnElement[bool]] = [] if force else [or_(COLUMNS.held_until.is_(None), COLUMNS.held_until < now)]
        return (
            update(resumable_uploads)
            .where(COLUMNS.id == id, *free)
            .values(attempt=COLUMNS.attempt + 1, held_until=now + lease_seconds)
            .returning(resumable_uploads)
        )

    def renew_resumable(self, held: ResumableRecord, lease_seconds: float) -> None:
        """Goes on holding an upload."""
        with self._write() as connection:
            _change(connection, held, held_until=self._clock() + lease_seconds)

    def leave_resumable(self, held: ResumableRecord) -> None:
        """Lets the next request have the upload; nothing happens where another one has it already."""
        with self._write() as connection:
            connection.execute(_of(held).values(held_until=None))

    def advance_resumable(self, held: ResumableRecord, received: int, expiry_seconds: float) -> ResumableRecord:
        """Acknowledges bytes that are durable."""
        expires_at = self._now() + timedelta(seconds=expiry_seconds)
        with self._write() as connection:
            return _change(connection, held, received=received, expires_at=expires_at)

    def pin_resumable(self, held: ResumableRecord, sha256: str) -> ResumableRecord:
        """Notes the digest of the whole: from now on nobody deletes the blob of that name, be it there already."""
        with self._write() as connection:
            self._lock(connection, sha256)
            return _change(connection, held, sha256=sha256)

    def finish_resumable(self, held: ResumableRecord, expiry_seconds: float) -> ResumableRecord:
        """Notes that the blob is in its place."""
        expires_at = self._now() + timedelta(seconds=expiry_seconds)
        with self._write() as connection:
            return _change(connection, held, finished=True, expires_at=expires_at)

    def drop_resumable(self, held: ResumableRecord, delete_blob: Callable[[str], None]) -> None:
        """Forgets an upload, and deletes its blob unless something else uses it."""
        with self._write() as connection:
            if held.sha256 is not None:
                self._lock(connection, held.sha256)
            gone = connection.execute(
                delete(resumable_uploads).where(COLUMNS.id == held.id, COLUMNS.attempt == held.attempt)
            )
            if gone.rowcount and held.sha256 is not None and not is_in_use(connection, held.sha256):
                delete_blob(held.sha256)

    def expired_resumables(self, limit: int) -> list[str]:
        """Uploads that have expired."""
        query = select(COLUMNS.id).where(COLUMNS.expires_at <= self._now()).order_by(COLUMNS.expires_at).limit(limit)
        with self._read() as connection:
            return list(connection.execute(query).scalars())


def _of(held: ResumableRecord) -> Update:
    return update(resumable_uploads).where(COLUMNS.id == held.id, COLUMNS.attempt == held.attempt)


def _change(connection: Connection, held: ResumableRecord, **values: Any) -> ResumableRecord:
    row = connection.execute(_of(held).values(values).returning(resumable_uploads)).one_or_none()
    if row is None:
        raise UploadLocked("Another request has taken this upload over, or it was terminated.")
    return rows.resumable(row)


def _missing(id: str) -> NotFound:
    return NotFound(f"There is no upload {id}: it has expired, was terminated, or belongs to another account.")
