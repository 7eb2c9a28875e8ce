"""Taking in bytes: every one of them once, durable before it is acknowledged, whatever breaks off."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from app.contract.blobs import Blobs, appender
from app.contract.blobs import digest as digest_module
from app.contract.blobs.appender import Appender, Checksum
from app.contract.blobs.digest import RecentDigests, RunningDigest
from app.contract.blobs.partial import Partial
from app.contract.errors import ChecksumMismatch
from app.contract.ids import new_id

MIB = 1 << 20


class Story:
    """One upload in a store, over several requests; `acknowledged` is what clients were told."""

    def __init__(self, blobs: Blobs, size: int) -> None:
        self.blobs, self.size, self.id = blobs, size, new_id("upl")
        self.acknowledged: list[int] = [0]
        self.digest = RunningDigest()
        self.attempt = 0

    def record(self, offset: int, digest: RunningDigest) -> None:
        assert offset > self.acknowledged[-1]
        assert digest.offset <= offset
        self.acknowledged.append(offset)
        self.digest = digest

    async def request(
        self, pieces: AsyncIterator[bytes], checksum: Checksum | None = None, digest: RunningDigest | None = None
    ) -> None:
        self.attempt += 1
        offset = self.acknowledged[-1]
        partial = self.blobs.partial(self.id)
        try:
            partial.begin(offset, self.attempt)
            running = digest or self.digest.copy()
            async with Appender(partial, running, offset, self.size - offset, self.record, checksum) as taking:
                await taking.take(pieces)
        finally:
            partial.close()

    def bytes(self) -> bytes:
        end = self.acknowledged[-1]
        partial = self.blobs.partial(self.id)
        partial.begin(end, self.attempt + 1)
        found = b"".join(partial.read(0, end))
        partial.close()
        return found

    def sha256(self) -> str:
        """As it is at the end of an upload."""
        end = self.acknowledged[-1]
        partial = self.blobs.partial(self.id)
        partial.begin(end, self.attempt + 1)
        self.digest.catch_up(partial, end)
        partial.close()
        return self.digest.hexdigest()


@pytest.fixture(params=["folder", "objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return Blobs.open(f"file://{tmp_path}/blobs") if request.param == "folder" else Blobs(MemoryStore())


async def pieces(*chunks: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.binary(max_size=40), max_size=12), st.booleans(), st.booleans()), min_size=1, max_size=5
    ),
    chunk=st.integers(1, 16),
    flush=st.integers(1, 64),
    catch_up=st.integers(1, 16),
)
def test_every_byte_arrives_once(
    blobs: Blobs, requests: list[tuple[list[bytes], bool, bool]], chunk: int, flush: int, catch_up: int
) -> None:
    """Requests that end well or break off, in one life of the service or after a restart that forgot the hash."""
    sent = b"".join(piece for request, _, _ in requests for piece in request)
    story = Story(blobs, len(sent) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appender, "CHUNK_BYTES", chunk)
        patch.setattr(appender, "FLUSH_BYTES", flush)
        patch.setattr(digest_module, "CATCH_UP_BYTES", catch_up)
        for request, breaks_off, restarted in requests:
            if restarted:
                story.digest = RunningDigest()
            error = ConnectionResetError() if breaks_off else None
            try:
                asyncio.run(story.request(pieces(*request, error=error)))
            except ConnectionResetError:
                assert breaks_off
    assert story.acknowledged[-1] == len(sent)  # what came before the break is kept
    assert story.bytes() == sent
    assert story.sha256() == hashlib.sha256(sent).hexdigest()


def test_a_long_body_is_acknowledged_on_its_way(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "FLUSH_BYTES", 8 * MIB)
    story = Story(blobs, 64 * MIB)
    seen: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(MIB)
            await asyncio.sleep(0.002)
            seen.append(story.acknowledged[-1])

    asyncio.run(story.request(body()))
    assert len(set(seen)) > 3
    assert story.acknowledged[-1] == 64 * MIB


def test_a_slow_body_is_acknowledged_too(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(blobs.partial(new_id("upl"))), "flush_seconds", 0.05)
    story = Story(blobs, 100)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"12345"
            await asyncio.sleep(0.06)
        assert story.acknowledged[-1] >= 10

    asyncio.run(story.request(body()))
    assert story.bytes() == b"12345" * 4


def test_nothing_is_acknowledged_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(
        "app.contract.blobs.folder_partial.os.fdatasync", lambda fd: synced.append(os.fstat(fd).st_size)
    )
    monkeypatch.setattr(appender, "FLUSH_BYTES", 4 * MIB)
    story = Story(Blobs.open(f"file://{tmp_path}"), 64 * MIB)
    record = story.record

    def checked(offset: int, digest: RunningDigest) -> None:
        assert synced[-1] >= offset
        record(offset, digest)

    story.record = checked  # type: ignore[method-assign]
    asyncio.run(story.request(pieces(*[bytes(MIB)] * 33)))
    assert story.acknowledged[-1] == 33 * MIB


def test_a_refused_record_ends_it(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request has taken the upload over: this one notices at its next step."""
    monkeypatch.setattr(appender, "FLUSH_BYTES", MIB)
    monkeypatch.setattr(appender, "CHUNK_BYTES", MIB)
    story = Story(blobs, 1000 * MIB)

    def refuse(*_: object) -> None:
        raise PermissionError("overtaken")

    story.record = refuse  # type: ignore[assignment]
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 500:
            taken += 1
            yield bytes(MIB)
            await asyncio.sleep(0.001)

    with pytest.raises(PermissionError, match="overtaken"):
        asyncio.run(story.request(endless()))
    assert taken < 100
    assert story.acknowledged == [0]


def test_a_cancelled_request_keeps_what_had_come(blobs: Blobs) -> None:
    story = Story(blobs, 64 * MIB)

    async def run() -> None:
        begun = asyncio.Event()

        async def stalls() -> AsyncIterator[bytes]:
            yield os.urandom(9 * MIB)
            begun.set()
            await asyncio.sleep(3600)

        request = asyncio.create_task(story.request(stalls()))
        await begun.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(run())
    assert story.acknowledged[-1] == 9 * MIB


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_bytes_with_a_checksum_count_whole_or_not_at_all(
    blobs: Blobs, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appender, "FLUSH_BYTES", 10)
    monkeypatch.setattr(appender, "CHUNK_BYTES", 4)
    story = Story(blobs, 1000)
    asyncio.run(story.request(pieces(b"first ")))

    def checksum(data: bytes) -> Checksum:
        return hashlib.new(algorithm), hashlib.new(algorithm, data).digest()

    with pytest.raises(ChecksumMismatch):
        asyncio.run(story.request(pieces(b"x" * 50), checksum(b"y" * 50)))
    with pytest.raises(ConnectionResetError):
        asyncio.run(story.request(pieces(b"x" * 25, error=ConnectionResetError()), checksum(b"x" * 50)))
    assert story.acknowledged == [0, 6]
    asyncio.run(story.request(pieces(b"sec", b"ond"), checksum(b"second")))
    assert story.bytes() == b"first second"
    assert story.sha256() == hashlib.sha256(b"first second").hexdigest()


def test_memory_stays_flat(tmp_path: Path) -> None:
    story = Story(Blobs.open(f"file://{tmp_path}"), 1 << 30)
    chunk = os.urandom(64 << 10)

    async def long() -> AsyncIterator[bytes]:
        for _ in range(2048):  # 128 MiB
            yield bytes(chunk)

    tracemalloc.start()
    asyncio.run(story.request(long()))
    asyncio.run(story.request(long(), digest=RunningDigest()))  # reads back what came before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * MIB
    assert story.sha256() == hashlib.sha256(chunk * 4096).hexdigest()


def test_the_hash_catches_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart the end of the upload does not have to wait for all of it to be read back."""
    monkeypatch.setattr(appender, "CHUNK_BYTES", 100)
    monkeypatch.setattr(digest_module, "CATCH_UP_BYTES", 400)
    story = Story(Blobs.open(f"file://{tmp_path}"), 10_000)
    asyncio.run(story.request(pieces(b"a" * 3000)))
    asyncio.run(story.request(pieces(b"b" * 2000), digest=RunningDigest()))
    assert story.digest.offset == 5000


def test_recent_digests_are_copies_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "MAX_REMEMBERED", 2)
    recent = RecentDigests()
    known = RunningDigest()
    known.follow(empty(), 0, b"abc")
    recent.put("one", known)
    recent.get("one", 3).follow(empty(), 3, b"def")
    assert recent.get("one", 3).hexdigest() == hashlib.sha256(b"abc").hexdigest()
    assert recent.get("one", 2).offset == 0  # of bytes that do not count any more
    recent.put("two", known)
    recent.put("three", known)
    assert recent.get("one", 3).offset == 0
    recent.forget("two")
    assert (recent.get("two", 3).offset, recent.get("three", 3).offset) == (0, 3)


def empty() -> Partial:
    """No bytes are read back here."""
    return Blobs(MemoryStore()).partial(new_id("upl"))
