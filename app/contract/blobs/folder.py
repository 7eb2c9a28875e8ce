"""The blob store in a local folder: plain files, so that an upload costs little more than writing it down."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import anyio
from obstore.store import LocalStore

from app.contract.blobs import keys
from app.contract.blobs.base import CHUNK_BYTES, Blobs, coalesce
from app.contract.blobs.folder_partial import FolderPartial, sync_folder, told_when_full
from app.contract.blobs.keys import Stored
from app.contract.blobs.partial import Partial
from app.contract.errors import BlobMissing

# Bytes go to the disk this often while more come in, so that the last fsync does not have to wait for all of them.
FLUSH_BYTES = 64 << 20


class FolderBlobs(Blobs):
    """Files under a folder; each appears under its name at once and whole."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root.resolve()
        super().__init__(LocalStore(self._root))

    async def ingest(self, chunks: AsyncIterable[bytes], max_bytes: int) -> Stored:
        """As in Blobs. While a chunk comes in, one thread hashes the one before, another writes it, a third flushes."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(3, "ingest") as threads:
            file = await loop.run_in_executor(threads, _Incoming, self._path(keys.incoming_key()))
            pending: list[Future[None]] = []
            try:
                with told_when_full():
                    async for chunk in coalesce(chunks, max_bytes):
                        await _all(pending)
                        pending = [threads.submit(file.hash, chunk), threads.submit(file.write, chunk)]
                        if file.unflushed >= FLUSH_BYTES and file.flushing.done():
                            file.flushing = threads.submit(file.flush)
                    await _all([*pending, file.flushing])
                    return await loop.run_in_executor(threads, self._publish, file)
            finally:
                # Handed over before it is awaited: it runs even if the wait is cancelled again.
                removal = loop.run_in_executor(threads, file.discard, [*pending, file.flushing])
                with anyio.CancelScope(shield=True):
                    await removal

    def _publish(self, file: _Incoming, key: str | None = None) -> Stored:
        stored = file.finish()
        target = self._path(key or keys.blob_key(stored.sha256))
        target.parent.mkdir(parents=True, exist_ok=True)
        file.path.replace(target)
        sync_folder(target.parent)
        return stored

    def partial(self, upload_id: str) -> Partial:
        """As in Blobs; raises UploadLocked while somebody has it open."""
        return FolderPartial(self._path(keys.partial_key(upload_id)), lambda sha256: self._path(keys.blob_key(sha256)))

    def fetch(self, key: str, path: Path) -> None:
        """A copy and not a link: what runs on it may not change the stored bytes."""
        try:
            shutil.copyfile(self._path(key), path)
        except FileNotFoundError:
            raise BlobMissing() from None

    def put_file(self, path: Path, key: str) -> Stored:
        """As in Blobs."""
        file = _Incoming(self._path(keys.incoming_key()))
        try:
            with path.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    file.hash(chunk)
                    file.write(chunk)
            return self._publish(file, key)
        finally:
            file.discard()

    def delete_prefix(self, prefix: str) -> None:
        """As in Blobs, with the folder itself."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path(prefix))

    def _path(self, key: str) -> Path:
        path = (self._root / key).resolve()
        if not path.is_relative_to(self._root) or path == self._root:
            raise ValueError(f"the key {key!r} leads out of the blob folder")
        return path


class _Incoming:
    """A file that is being written and hashed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._size = 0
        self.unflushed = 0
        self.flushing: Future[None] = Future()
        self.flushing.set_result(None)

    def hash(self, chunk: bytes | memoryview) -> None:
        """Takes the next chunk into the digest."""
        self._digest.update(chunk)

    def write(self, chunk: bytes | memoryview) -> None:
        """Writes all of it."""
        rest = memoryview(chunk)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(chunk)
        self.unflushed += len(chunk)

    def flush(self) -> None:
        """Has the disk take what was written so far, while more is written."""
        self.unflushed = 0
        os.fdatasync(self._file.fileno())

    def finish(self) -> Stored:
        """Makes it durable; what it holds."""
        os.fsync(self._file.fileno())
        self._file.close()
        return Stored(self._digest.hexdigest(), self._size)

    def discard(self, pending: Sequence[Future[None]] = ()) -> None:
        """Removes it when what still writes to it is done, unless it has been moved to its place."""
        wait(pending)
        self._file.close()
        self.path.unlink(missing_ok=True)


async def _all(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        await asyncio.wrap_future(future)
