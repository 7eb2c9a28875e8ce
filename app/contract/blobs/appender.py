"""Takes bytes into a resumable upload: while some come in, others are hashed, written, and made durable."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import anyio

from app.contract.blobs.base import CHUNK_BYTES
from app.contract.blobs.digest import RunningDigest
from app.contract.blobs.partial import Partial
from app.contract.errors import ChecksumMismatch

# Bytes are made durable and acknowledged this often while more come in.
FLUSH_BYTES = 64 << 20


class Hash(Protocol):
    """A hash of hashlib's."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


# A hash that has taken in nothing, and what it shall give at the end.
Checksum = tuple[Hash, bytes]


class Appender:
    """Appends to a partial that stands at `offset`; `most` more bytes are to come.

    `record` is called, in a thread, with every offset up to which bytes are durable, and the digest so far. It may
    raise: then nothing more is recorded, and the error comes out at the next step. What has come is recorded at the
    end, also where the client breaks off. Only with a `checksum` it is all or nothing.
    """

    def __init__(
        self,
        partial: Partial,
        digest: RunningDigest,
        offset: int,
        most: int,
        record: Callable[[int, RunningDigest], None],
        checksum: Checksum | None = None,
    ) -> None:
        self._partial, self._digest, self._record, self._checksum = partial, digest, record, checksum
        size = min(CHUNK_BYTES, most)
        self._buffer, self._other = memoryview(bytearray(size)), memoryview(bytearray(size))
        self._filled = 0
        self._handed = self._sealed = offset
        self._sealed_at = time.monotonic()
        self._pending: list[Future[None]] = []
        self._flushing: Future[None] = Future()
        self._flushing.set_result(None)
        self._threads = ThreadPoolExecutor(3, "append")
        self._keep = checksum is None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            try:
                if self._keep:
                    await self._settle()
            finally:
                # In another thread, for it waits for what still runs in these.
                await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)

    async def take(self, pieces: AsyncIterable[bytes]) -> None:
        """Takes all of them. Raises ChecksumMismatch where they have another checksum; then none of them counts."""
        async for piece in pieces:
            rest = memoryview(piece)
            while rest:
                taken = rest[: len(self._buffer) - self._filled]
                self._buffer[self._filled : self._filled + len(taken)] = taken
                self._filled, rest = self._filled + len(taken), rest[len(taken) :]
                if self._filled == len(self._buffer):
                    await self._hand_over()
            if self._is_due():
                await self._hand_over()
                await self._flush()
        await self._hand_over()
        await _all(self._pending)
        if self._checksum is not None:
            actual, expected = self._checksum
            if not hmac.compare_digest(actual.digest(), expected):
                raise ChecksumMismatch()
            self._keep = True

    def _is_due(self) -> bool:
        waiting = self._handed + self._filled - self._sealed
        late = time.monotonic() - self._sealed_at >= self._partial.flush_seconds
        return self._checksum is None and self._flushing.done() and (waiting >= FLUSH_BYTES or (late and waiting > 0))

    async def _hand_over(self) -> None:
        """Gives the filled buffer to the threads, once they have done with the other one."""
        await _all(self._pending)
        if not self._filled:
            return
        start, chunk = self._handed, self._buffer[: self._filled]
        work = ((self._hash, start, chunk), (self._partial.write, chunk))
        self._pending = [self._threads.submit(*call) for call in work]
        self._handed += self._filled
        self._buffer, self._other, self._filled = self._other, self._buffer, 0

    def _hash(self, start: int, chunk: memoryview) -> None:
        self._digest.follow(self._partial, start, chunk)
        if self._checksum is not None:
            self._checksum[0].update(chunk)

    async def _flush(self) -> None:
        """Begins to make durable and to record what was handed over; more is taken meanwhile."""
        await _all([*self._pending, self._flushing])
        self._sealed, self._sealed_at = self._handed, time.monotonic()
        self._flushing = self._threads.submit(
            self._make_durable, self._partial.seal(), self._sealed, self._digest.copy()
        )

    def _make_durable(self, durable: Callable[[], None], offset: int, digest: RunningDigest) -> None:
        durable()
        self._record(offset, digest)

    async def _settle(self) -> None:
        await self._hand_over()
        await _all([*self._pending, self._flushing])
        if self._handed > self._sealed:
            await self._flush()
            await _all([self._flushing])


async def _all(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        # Shielded: who is cancelled here still has what was handed over written, and records it on the way out.
        await asyncio.shield(asyncio.wrap_future(future))
