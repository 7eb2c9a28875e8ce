"""A resumable upload from its first byte to its blob: who sends holds it, and what has come is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import anyio
import anyio.to_thread
from fastapi import Request
from sqlalchemy.exc import SQLAlchemyError

from app.bodies import IDLE_SECONDS, refuse_length
from app.contract.blobs.appender import Appender, Checksum
from app.contract.blobs.digest import RunningDigest
from app.contract.blobs.partial import Partial
from app.contract.errors import (
    BlobMissing,
    DigestMismatch,
    OffsetMismatch,
    ServiceUnavailable,
    UploadIncomplete,
    UploadLocked,
    UploadTooLarge,
    UploadUnfinished,
)
from app.contract.records import ResumableRecord
from app.contract.resumable import LEASE_SECONDS, remove
from app.services import Services, in_thread

log = logging.getLogger("tersor.uploads")

# A connection that died without a word looks like one that is slow: after this long without a byte others may go on
# with the upload. Should the client turn out to be slow, it goes on too, unless another has meanwhile.
YIELD_SECONDS = 5.0
# Bytes with a checksum count all together or not at all, so the upload cannot be yielded between them.
CHECKED_IDLE_SECONDS = 15.0
# A request that has just acknowledged its bytes, or whose client is gone, lets go of the upload within a moment.
PATIENCE_SECONDS = 0.5
# So often whoever takes the bytes gets to look at the clock while nothing comes.
TICK_SECONDS = 1.0


class Body:
    """A request's body in pieces, at most `most` bytes. `ended` says that all of it has come."""

    def __init__(self, request: Request, services: Services, most: int) -> None:
        self._request, self._services, self._left = request, services, most
        self._next: bytes | None = None
        self.ended = False

    async def pieces(self, seconds: float, *, may_pause: bool = True) -> AsyncIterator[bytes]:
        """Until the end, or until nothing has come for so long, where it may pause. An empty piece: time passes.

        Raises UploadIncomplete where the client goes away, UploadTooLarge, and ServiceUnavailable when the service
        ends: what has come so far is a good place to go on from.
        """
        silent = 0.0
        while not (self.ended and self._next is None):
            tick = min(TICK_SECONDS, seconds)
            silent = 0.0 if self._next is not None or await self._receive(tick) else silent + tick
            if silent >= seconds:
                if may_pause:
                    return
                raise UploadIncomplete(f"Nothing came for {seconds:.0f} s. Nothing was kept: send the bytes again.")
            piece, self._next = self._next or b"", None
            self._left -= len(piece)
            if self._left < 0:
                raise UploadTooLarge("The body is longer than what the upload lacks by its Upload-Length.")
            yield piece
            if self._services.closing and not self.ended:
                raise ServiceUnavailable("The service restarts. Ask for the upload's offset and go on from there.")

    async def wait(self, seconds: float) -> None:
        """Until more has come; raises UploadIncomplete where nothing does."""
        if not await self._receive(seconds):
            raise UploadIncomplete("Nothing came for a while. What had come is kept: go on from the upload's offset.")

    async def _receive(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                raise UploadIncomplete("The body broke off. What had come is kept: go on from the upload's offset.")
            self._next = message.get("body", b"")
            self.ended = not message.get("more_body", False)
            return True
        return False


class Held:
    """An upload that this request holds; `record` is how far it is."""

    def __init__(self, services: Services, partial: Partial, record: ResumableRecord) -> None:
        self.record = record
        self._services, self._partial = services, partial

    async def append(self, body: Body, checksum: Checksum | None) -> None:
        """Takes in the body until it ends or pauses; with a checksum only whole. Raises ChecksumMismatch."""
        record, services = self.record, self._services
        pieces = body.pieces(YIELD_SECONDS) if checksum is None else body.pieces(CHECKED_IDLE_SECONDS, may_pause=False)
        most = record.size_bytes - record.received
        if not most:
            async for piece in pieces:
                assert not piece  # the body lets none pass
            return
        await in_thread(self._partial.begin, record.received, record.attempt)
        digest = services.digests.get(record.id, record.received)
        async with Appender(self._partial, digest, record.received, most, self._note, checksum) as appender:
            await appender.take(pieces)

    def _note(self, offset: int, digest: RunningDigest) -> None:
        """Bytes are durable: acknowledges them. Runs in a thread."""
        expiry = self._services.settings.upload_expiry_seconds
        self.record = self._services.store.advance_resumable(self.record, offset, expiry)
        self._services.digests.put(self.record.id, digest)

    async def complete(self) -> None:
        """Verifies all of the bytes and makes them a blob, if that has not been done.

        Raises DigestMismatch where they are not what was promised; then nothing of the upload is left.
        """
        if not self.record.finished:
            await anyio.to_thread.run_sync(self._complete, limiter=self._services.completing)

    def _complete(self) -> None:
        services, partial = self._services, self._partial
        pinned = self.record.sha256
        # An earlier try may have got as far as this before its process was killed.
        if pinned is None or not services.blobs.exists(services.blobs.blob_key(pinned)):
            sha256 = self._verified_digest()
            self.record = services.store.pin_resumable(self.record, sha256)
            partial.promote(sha256)
        partial.discard()
        self.record = services.store.finish_resumable(self.record, services.settings.upload_expiry_seconds)
        services.digests.forget(self.record.id)

    def _verified_digest(self) -> str:
        record = self.record
        self._partial.begin(record.received, record.attempt)
        digest = self._services.digests.get(record.id, record.received)
        digest.catch_up(self._partial, record.size_bytes)
        sha256 = digest.hexdigest()
        if record.promised_sha256 not in (None, sha256):
            self.remove()
            raise DigestMismatch(
                f"The uploaded bytes have the SHA-256 {sha256}, promised was {record.promised_sha256}. "
                "The upload was discarded: create a new one."
            )
        return sha256

    def remove(self) -> None:
        """Removes the upload and what is left of its bytes. Blocks."""
        remove(self._services.store, self._services.blobs, self._partial, self.record)
        self._services.digests.forget(self.record.id)

    async def keep(self) -> None:
        """Goes on holding it, until cancelled."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            try:
                await in_thread(self._services.store.renew_resumable, self.record, LEASE_SECONDS)
            except UploadLocked:
                return  # whatever is still recorded is refused with the same error
            except SQLAlchemyError as error:
                log.warning("the database does not answer: %s", error)


@contextlib.asynccontextmanager
async def held(services: Services, upload_id: str) -> AsyncIterator[Held]:
    """Holds an upload, so that no other request writes to it. Raises UploadLocked, NotFound.

    An upload whose bytes turn out to be gone is removed.
    """
    hold, partial = await _take(services, upload_id)
    try:
        async with _lease(services, hold, partial):
            try:
                yield hold
            except BlobMissing:
                await in_thread(hold.remove)
                raise
    finally:
        with anyio.CancelScope(shield=True):
            await in_thread(partial.close)


async def _take(services: Services, upload_id: str) -> tuple[Held, Partial]:
    deadline = anyio.current_time() + PATIENCE_SECONDS
    while True:
        try:
            return await in_thread(_try_to_take, services, upload_id)
        except UploadLocked:
            if anyio.current_time() > deadline:
                raise
        await anyio.sleep(PATIENCE_SECONDS / 10)


def _try_to_take(services: Services, upload_id: str) -> tuple[Held, Partial]:
    partial = services.blobs.partial(upload_id)
    try:
        record = services.store.take_resumable(upload_id, LEASE_SECONDS, partial.exclusive)
    except BaseException:
        partial.close()
        raise
    return Held(services, partial, record), partial


@contextlib.asynccontextmanager
async def _lease(services: Services, hold: Held, partial: Partial) -> AsyncIterator[None]:
    """Keeps the record's lease, unless the blob store keeps others out by itself."""
    if partial.exclusive:
        yield
        return
    keeping = asyncio.create_task(hold.keep())
    try:
        yield
    finally:
        keeping.cancel()
        with anyio.CancelScope(shield=True):
            await in_thread(services.store.leave_resumable, hold.record)


async def receive_bytes(
    request: Request,
    services: Services,
    record: ResumableRecord,
    offset: int | None,
    checksum: Checksum | None,
) -> ResumableRecord:
    """Takes a request's body into an upload that stands at `offset`; the upload afterwards.

    Raises OffsetMismatch, UploadLocked, UploadTooLarge, ChecksumMismatch, DigestMismatch, and UploadIncomplete where
    not all of the body comes.
    """
    if offset is None or offset != record.received:
        raise _elsewhere(record)
    refuse_length(request, record.size_bytes - offset)
    body = Body(request, services, record.size_bytes - offset)
    while True:
        async with held(services, record.id) as hold:
            if hold.record.received != offset:
                raise _elsewhere(hold.record)
            try:
                await hold.append(body, checksum)
            finally:
                services.metrics.uploaded.labels("resumable").inc(hold.record.received - offset)
            if body.ended and hold.record.received == record.size_bytes:
                await hold.complete()
            record, offset = hold.record, hold.record.received
        if body.ended:
            return record
        await body.wait(IDLE_SECONDS - YIELD_SECONDS)


def _elsewhere(record: ResumableRecord) -> OffsetMismatch:
    return OffsetMismatch(f"{record.received} of {record.size_bytes} bytes have come: go on from there.")


async def finished(services: Services, record: ResumableRecord) -> ResumableRecord:
    """The upload with its blob in place. Raises UploadUnfinished, UploadLocked, DigestMismatch."""
    if record.finished:
        return record
    if record.received < record.size_bytes:
        raise UploadUnfinished(f"Of the upload {record.id} {record.received} of {record.size_bytes} bytes have come.")
    async with held(services, record.id) as hold:
        await hold.complete()
        return hold.record


async def terminate(services: Services, record: ResumableRecord) -> None:
    """Ends an upload for good. Raises UploadLocked."""
    async with held(services, record.id) as hold:
        await in_thread(hold.remove)
