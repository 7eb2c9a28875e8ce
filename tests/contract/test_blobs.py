"""Both kinds of store: a folder, and an object store (in memory, through the same client as S3)."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from app.contract.blobs import Blobs, Stored, base, blob_key, output_key
from app.contract.blobs.base import coalesce
from app.contract.blobs.folder import FolderBlobs
from app.contract.errors import BlobMissing, ServiceUnavailable, UploadTooLarge

MIB = 1 << 20


@pytest.fixture(params=["folder", "objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return Blobs.open(f"file://{tmp_path}/my%20blobs") if request.param == "folder" else Blobs(MemoryStore())


async def body(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def ingest(blobs: Blobs, *chunks: bytes, max_bytes: int = 64 * MIB) -> Stored:
    return asyncio.run(blobs.ingest(body(*chunks), max_bytes))


def read(blobs: Blobs, key: str, start: int = 0, end: int | None = None) -> bytes:
    async def collect() -> bytes:
        return b"".join([chunk async for chunk in blobs.stream(key, start, end)])

    return asyncio.run(collect())


def keys(blobs: Blobs) -> set[str]:
    return {found["path"] for batch in base.obstore.list(blobs._store) for found in batch}


def test_a_body_is_stored_under_its_digest(blobs: Blobs) -> None:
    chunks = [os.urandom(100_000) for _ in range(100)]  # 10 MB: several writes
    whole = b"".join(chunks)
    stored = ingest(blobs, *chunks)
    assert stored == Stored(hashlib.sha256(whole).hexdigest(), len(whole))
    assert keys(blobs) == {blob_key(stored.sha256)}
    assert blobs.size(blob_key(stored.sha256)) == len(whole)
    assert read(blobs, blob_key(stored.sha256)) == whole


def test_the_same_body_twice_is_one_blob(blobs: Blobs) -> None:
    assert ingest(blobs, b"ab", b"c") == ingest(blobs, b"a", b"", b"bc")
    assert len(keys(blobs)) == 1


def test_an_empty_body_is_a_body(blobs: Blobs) -> None:
    stored = ingest(blobs)
    assert stored == Stored(hashlib.sha256(b"").hexdigest(), 0)
    assert read(blobs, blob_key(stored.sha256)) == b""


def test_a_body_that_is_too_large_leaves_nothing(blobs: Blobs) -> None:
    assert ingest(blobs, b"x" * 10, max_bytes=10).size_bytes == 10
    before = keys(blobs)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += MIB
            yield bytes(MIB)

    with pytest.raises(UploadTooLarge, match=str(9 * MIB)):
        asyncio.run(blobs.ingest(endless(), 9 * MIB))
    assert sent == 10 * MIB  # it stopped reading
    assert keys(blobs) == before


def test_a_body_that_breaks_off_leaves_nothing(blobs: Blobs) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(9 * MIB)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        asyncio.run(blobs.ingest(broken(), 64 * MIB))
    assert keys(blobs) == set()


def test_an_upload_that_is_cancelled_leaves_nothing(blobs: Blobs) -> None:
    async def story() -> None:
        begun = asyncio.Event()

        async def stalls() -> AsyncIterator[bytes]:
            yield bytes(9 * MIB)
            begun.set()
            await asyncio.sleep(3600)

        upload = asyncio.create_task(blobs.ingest(stalls(), 64 * MIB))
        await begun.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload

    asyncio.run(story())
    assert keys(blobs) == set()


def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FolderBlobs(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.contract.blobs.folder.os.fsync", full)
    with pytest.raises(ServiceUnavailable, match="no room"):
        ingest(blobs, b"abc")
    monkeypatch.undo()
    assert keys(blobs) == set()


def test_memory_stays_flat(tmp_path: Path) -> None:
    chunk = os.urandom(64 << 10)

    async def long() -> AsyncIterator[bytes]:
        for _ in range(4096):  # 256 MiB
            yield bytes(chunk)

    tracemalloc.start()
    asyncio.run(FolderBlobs(tmp_path).ingest(long(), 1 << 30))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * MIB


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 16))
def test_coalescing_changes_no_byte(chunks: list[bytes], size: int) -> None:
    async def collect() -> list[bytes]:
        return [bytes(chunk) async for chunk in coalesce(body(*chunks), 1 << 20)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CHUNK_BYTES", size)
        found = asyncio.run(collect())
    assert b"".join(found) == b"".join(chunks)
    assert {len(chunk) for chunk in found[:-1]} <= {size}


@pytest.mark.parametrize(("start", "end"), [(0, None), (0, 5), (3, 7), (7, None), (4, 4), (9, 10)])
def test_ranges_end_before_their_end(blobs: Blobs, start: int, end: int | None) -> None:
    stored = ingest(blobs, b"0123456789")
    assert read(blobs, blob_key(stored.sha256), start, end) == b"0123456789"[start:end]


def test_a_missing_key_is_a_missing_blob(blobs: Blobs, tmp_path: Path) -> None:
    for call in (
        lambda: blobs.size("jobs/x/1/y"),
        lambda: read(blobs, "jobs/x/1/y"),
        lambda: blobs.fetch("jobs/x/1/y", tmp_path / "copy"),
    ):
        with pytest.raises(BlobMissing):
            call()
    assert not blobs.exists("jobs/x/1/y")
    assert not (tmp_path / "copy").exists()
    blobs.delete("jobs/x/1/y")
    blobs.delete_prefix("jobs/x/1/")


def test_outputs_come_and_go_by_attempt(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5 * MIB))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    first, second = output_key("job_a", 1, "model.onnx"), output_key("job_a", 12, "model.onnx")
    assert first == "jobs/job_a/1/model.onnx"
    for key in (first, second):
        assert blobs.put_file(source, key) == Stored(digest, 5 * MIB)
    blobs.fetch(first, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    blobs.delete_prefix("jobs/job_a/1/")
    assert keys(blobs) == {second}
    blobs.delete(second)
    assert not blobs.exists(second)


def test_a_fetched_copy_is_not_the_blob_itself(blobs: Blobs, tmp_path: Path) -> None:
    stored = ingest(blobs, b"precious")
    blobs.fetch(blob_key(stored.sha256), tmp_path / "copy")
    (tmp_path / "copy").write_bytes(b"scribble")
    assert read(blobs, blob_key(stored.sha256)) == b"precious"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\0b", "x" * 129, "ü"])
def test_an_output_has_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="named by"):
        output_key("job_a", 1, name)


def test_no_key_leads_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    blobs = FolderBlobs(tmp_path / "blobs")
    for call in (
        lambda: blobs.fetch("../secret", tmp_path / "copy"),
        lambda: blobs.delete_prefix("../"),
        lambda: blobs.delete_prefix(""),
    ):
        with pytest.raises(ValueError, match="leads out"):
            call()
    assert (tmp_path / "secret").exists()


def test_what_killed_uploads_left_is_removed_after_a_while(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    kept = ingest(blobs, b"kept")
    left = tmp_path / "incoming" / "abc"
    left.write_bytes(b"half")
    assert blobs.remove_stale_incoming(60) == 0
    os.utime(left, (time.time() - 120,) * 2)
    assert blobs.remove_stale_incoming(60) == 1
    assert keys(blobs) == {blob_key(kept.sha256)}


def test_an_object_too_large_to_copy_is_streamed_to_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_COPY_BYTES", 4)
    blobs = Blobs(MemoryStore())
    stored = ingest(blobs, b"0123456789")
    assert keys(blobs) == {blob_key(stored.sha256)}
    assert read(blobs, blob_key(stored.sha256)) == b"0123456789"


def test_a_ping_of_a_store_that_is_there_passes(blobs: Blobs) -> None:
    blobs.ping()
