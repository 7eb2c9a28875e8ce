"""The blob store over obstore: what holds for every kind of store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterable, AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

import anyio
import anyio.to_thread
import obstore
from obstore.exceptions import NotFoundError
from obstore.store import ObjectStore, from_url

from app.contract.blobs import keys
from app.contract.blobs.keys import Stored
from app.contract.errors import BlobMissing, UploadTooLarge

if TYPE_CHECKING:
    from obstore import GetOptions

    from app.contract.blobs.partial import Partial

# What one call to the hash, the disk or the network takes: large enough that the calls cost nothing.
CHUNK_BYTES = 4 << 20
STREAM_CHUNK_BYTES = 1 << 20
# S3 copies no larger object in one request.
MAX_COPY_BYTES = 5_000_000_000
MAX_PARTS = 9000  # S3 takes 10,000 in one multipart upload


class Blobs:
    """Bytes under keys. Reads of a key that is not there raise BlobMissing."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @staticmethod
    def open(url: str) -> Blobs:
        """`file:///folder`, or an `s3://`, `gs://` or `az://` URL whose credentials are in the environment."""
        parsed = urlparse(url)
        if parsed.scheme != "file":
            return Blobs(from_url(url))
        from app.contract.blobs.folder import FolderBlobs  # it builds on this module

        return FolderBlobs(Path(unquote(parsed.path)))

    blob_key = staticmethod(keys.blob_key)
    output_key = staticmethod(keys.output_key)

    def ping(self) -> None:
        """Raises where the store does not answer."""
        next(iter(obstore.list(self._store, "ping/", chunk_size=1)), None)

    async def ingest(self, chunks: AsyncIterable[bytes], max_bytes: int) -> Stored:
        """Stores a body under its digest while it comes in, with flat memory; it is there when this returns.

        Raises UploadTooLarge as soon as the body passes `max_bytes`. Nothing is left after any error.
        """
        incoming = keys.incoming_key()
        digest, size = hashlib.sha256(), 0
        # The writer sends nothing that others see before it is closed.
        writer = obstore.open_writer_async(self._store, incoming, buffer_size=2 * CHUNK_BYTES)
        async for chunk in coalesce(chunks, max_bytes):
            await anyio.to_thread.run_sync(digest.update, chunk)
            await writer.write(bytes(chunk))  # a copy: the writer keeps it while it sends
            size += len(chunk)
        try:
            await writer.close()
            stored = Stored(digest.hexdigest(), size)
            await self._promote(incoming, stored)
        finally:
            with anyio.CancelScope(shield=True):
                await self._discard(incoming)
        return stored

    def partial(self, upload_id: str) -> Partial:
        """A resumable upload, for going on with it; close it afterwards."""
        from app.contract.blobs.partial import ObjectPartial  # it builds on this module

        return ObjectPartial(self._store, upload_id)

    async def _promote(self, incoming: str, stored: Stored) -> None:
        target = keys.blob_key(stored.sha256)
        if stored.size_bytes <= MAX_COPY_BYTES:
            await obstore.copy_async(self._store, incoming, target)
        else:
            found = await obstore.get_async(self._store, incoming)
            await obstore.put_async(self._store, target, found.stream(min_chunk_size=CHUNK_BYTES))

    async def _discard(self, key: str) -> None:
        try:
            await obstore.delete_async(self._store, key)
        except (NotFoundError, FileNotFoundError):
            return

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to but not including `end`, in chunks of about 1 MiB."""
        if end is not None and start >= end:
            return
        options: GetOptions = {}
        if start or end is not None:
            options["range"] = {"offset": start} if end is None else (start, end)
        try:
            found = await obstore.get_async(self._store, key, options=options)
        except (NotFoundError, FileNotFoundError):
            raise BlobMissing() from None
        async for chunk in found.stream(min_chunk_size=STREAM_CHUNK_BYTES):
            yield bytes(chunk)

    def size(self, key: str) -> int:
        """In bytes."""
        try:
            return int(obstore.head(self._store, key)["size"])
        except (NotFoundError, FileNotFoundError):
            raise BlobMissing() from None

    def exists(self, key: str) -> bool:
        """Whether there is something under the key."""
        try:
            obstore.head(self._store, key)
        except (NotFoundError, FileNotFoundError):
            return False
        return True

    def delete(self, key: str) -> None:
        """Removes what is under the key, if anything is."""
        try:
            obstore.delete(self._store, key)
        except (NotFoundError, FileNotFoundError):
            return

    def jobs_with_checkpoints(self) -> set[str]:
        """The ids of jobs that have checkpoints."""
        batches = obstore.list(self._store, keys.CHECKPOINTS)
        return {found["path"].split("/")[1] for batch in batches for found in batch}

    def delete_prefix(self, prefix: str) -> None:
        """Removes everything whose key starts with the prefix, which ends with a slash."""
        for batch in obstore.list(self._store, prefix, chunk_size=keys.DELETE_BATCH):
            obstore.delete(self._store, [found["path"] for found in batch])

    def fetch(self, key: str, path: Path) -> None:
        """Writes a copy to a local file."""
        try:
            found = obstore.get(self._store, key)
        except (NotFoundError, FileNotFoundError):
            raise BlobMissing() from None
        with path.open("xb") as file:
            for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                file.write(chunk)

    def put_file(self, path: Path, key: str) -> Stored:
        """Stores a local file, hashing it on the way."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file, obstore.open_writer(self._store, key, buffer_size=2 * CHUNK_BYTES) as writer:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
                size += len(chunk)
        return Stored(digest.hexdigest(), size)

    def remove_stale_incoming(self, max_age_seconds: float) -> int:
        """Removes what uploads left behind whose process was killed; how many there were."""
        oldest = datetime.fromtimestamp(time.time() - max_age_seconds, UTC)
        stale = [
            found["path"]
            for batch in obstore.list(self._store, keys.INCOMING)
            for found in batch
            if found["last_modified"] < oldest
        ]
        for key in stale:
            self.delete(key)
        return len(stale)


async def coalesce(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncIterator[memoryview]:
    """The same bytes in chunks of CHUNK_BYTES, in two buffers by turns: each is valid until the next but one.

    Raises UploadTooLarge when they pass `max_bytes`.
    """
    size = filled = 0
    buffer, other = memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise UploadTooLarge(f"The body is larger than {max_bytes} bytes, which is the most this service takes.")
        rest = memoryview(chunk)
        while rest:
            taken = rest[: CHUNK_BYTES - filled]
            buffer[filled : filled + len(taken)] = taken
            filled, rest = filled + len(taken), rest[len(taken) :]
            if filled == CHUNK_BYTES:
                yield buffer
                buffer, other, filled = other, buffer, 0
    if filled:
        yield buffer[:filled]
