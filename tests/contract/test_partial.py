"""Resumable uploads in the blob store: a file that grows, or objects side by side."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from app.contract.blobs import Blobs, blob_key
from app.contract.blobs.partial import ObjectPartial, Partial
from app.contract.errors import BlobMissing, ServiceUnavailable, UploadLocked
from app.contract.ids import new_id
from tests.contract.test_blobs import keys, read


@pytest.fixture(params=["folder", "memory", "objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return Blobs.open(f"file://{tmp_path}/blobs")
    (tmp_path / "objects").mkdir()
    return Blobs(MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "objects"))


@pytest.fixture
def upload_id() -> str:
    return new_id("upl")


def write(partial: Partial, *chunks: bytes) -> None:
    """Each chunk made durable on its own."""
    for chunk in chunks:
        partial.write(chunk)
        partial.seal()()


def whole(partial: Partial, end: int) -> bytes:
    return b"".join(partial.read(0, end))


def test_bytes_of_several_attempts_become_a_blob(blobs: Blobs, upload_id: str) -> None:
    chunks = [os.urandom(size) for size in (1, 5_000_000, 9, 9_000_000)]
    data = b"".join(chunks)
    sha256 = hashlib.sha256(data).hexdigest()
    offset = 0
    for attempt, chunk in enumerate(chunks, 1):
        partial = blobs.partial(upload_id)
        partial.begin(offset, attempt)
        half = len(chunk) // 2
        write(partial, chunk[:half], chunk[half:]) if half else write(partial, chunk)
        offset += len(chunk)
        assert partial.readable == offset
        assert whole(partial, offset) == data[:offset]
        if attempt < len(chunks):
            partial.close()
    assert b"".join(partial.read(3, 4_000_000)) == data[3:4_000_000]
    partial.promote(sha256)
    partial.discard()
    partial.close()
    assert keys(blobs) == {blob_key(sha256)}
    assert read(blobs, blob_key(sha256)) == data


def test_what_was_not_acknowledged_does_not_count(blobs: Blobs, upload_id: str) -> None:
    """The process dies after writing more than it acknowledged; the client sends other bytes from there on."""
    killed = blobs.partial(upload_id)
    killed.begin(0, 1)
    write(killed, b"abc", b"LOST")
    killed.write(b"never sealed")
    killed.close()
    partial = blobs.partial(upload_id)
    partial.begin(3, 2)
    write(partial, b"def")
    assert whole(partial, 6) == b"abcdef"
    partial.close()
    again = blobs.partial(upload_id)
    again.begin(6, 3)
    write(again, b"g")
    assert whole(again, 7) == b"abcdefg"
    again.close()


def test_an_object_of_an_attempt_that_was_overtaken_is_ignored() -> None:
    """It still writes after another one has taken over, at the same place and in the middle of the other's bytes."""
    store, upload_id = MemoryStore(), new_id("upl")
    overtaken, current = ObjectPartial(store, upload_id), ObjectPartial(store, upload_id)
    overtaken.begin(0, 1)
    current.begin(0, 2)
    write(current, b"abcdef")
    write(overtaken, b"XX", b"YY")
    last = ObjectPartial(store, upload_id)
    last.begin(6, 3)
    write(last, b"gh")
    assert whole(last, 8) == b"abcdefgh"
    sha256 = hashlib.sha256(b"abcdefgh").hexdigest()
    last.promote(sha256)
    assert keys(Blobs(store)) == {blob_key(sha256)}


def test_lost_bytes_are_missed(blobs: Blobs, upload_id: str) -> None:
    partial = blobs.partial(upload_id)
    partial.begin(0, 1)
    write(partial, b"abc")
    partial.discard()
    partial.close()
    fresh = blobs.partial(upload_id)
    with pytest.raises(BlobMissing):
        fresh.begin(3, 2)
    fresh.close()
    assert keys(blobs) == set()


def test_a_hole_between_objects_is_missed() -> None:
    store, upload_id = MemoryStore(), new_id("upl")
    partial = ObjectPartial(store, upload_id)
    partial.begin(0, 1)
    write(partial, b"abc", b"def")
    Blobs(store).delete(min(keys(Blobs(store))))
    with pytest.raises(BlobMissing, match="from 0 on"):
        ObjectPartial(store, upload_id).begin(6, 2)


def test_discarding_leaves_nothing(blobs: Blobs, upload_id: str) -> None:
    partial = blobs.partial(upload_id)
    partial.begin(0, 1)
    write(partial, b"abc", b"def")
    assert keys(blobs)
    partial.discard()
    partial.close()
    assert keys(blobs) == set()


def test_looking_leaves_nothing(blobs: Blobs, upload_id: str) -> None:
    blobs.partial(upload_id).close()
    assert keys(blobs) == set()


def test_a_blob_that_is_there_already_is_kept(blobs: Blobs) -> None:
    for _ in range(2):
        partial = blobs.partial(new_id("upl"))
        partial.begin(0, 1)
        write(partial, b"same")
        partial.promote(hashlib.sha256(b"same").hexdigest())
        partial.close()
    assert len(keys(blobs)) == 1


@pytest.mark.parametrize("id", ["", "..", "upl_../../../../../etc/passwd000", "upl_" + "A" * 26, "mdl_" + "0" * 26])
def test_only_ids_name_uploads(blobs: Blobs, id: str) -> None:
    with pytest.raises(ValueError, match="an upload's id"):
        blobs.partial(id)


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Blobs:
        return Blobs.open(f"file://{tmp_path}")

    def test_one_at_a_time(self, folder: Blobs, upload_id: str) -> None:
        first = folder.partial(upload_id)
        with pytest.raises(UploadLocked):
            folder.partial(upload_id)
        other = folder.partial(new_id("upl"))
        first.close()
        other.close()
        folder.partial(upload_id).close()

    @pytest.fixture
    def stranger(self, folder: Blobs, upload_id: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Another process that holds the upload."""
        code = (
            "import sys, time; from app.contract.blobs import Blobs\n"
            f"partial = Blobs.open('file://{tmp_path}').partial('{upload_id}'); partial.begin(0, 1)\n"
            "partial.write(b'abc'); print('holds', flush=True); time.sleep(600)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        yield process
        process.kill()
        process.wait()

    def test_nor_by_two_processes_and_a_killed_one_lets_go(
        self, folder: Blobs, upload_id: str, stranger: subprocess.Popen[bytes]
    ) -> None:
        with pytest.raises(UploadLocked):
            folder.partial(upload_id)
        stranger.kill()
        stranger.wait()
        partial = folder.partial(upload_id)
        partial.begin(0, 2)
        write(partial, b"xyz")
        assert whole(partial, 3) == b"xyz"
        partial.close()

    def test_a_file_that_went_away_meanwhile_is_not_written_to(
        self, folder: Blobs, upload_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between opening and locking another process made a blob of it: what is open now is that blob."""
        first = folder.partial(upload_id)
        first.begin(0, 1)
        write(first, b"abc")

        def promoted_meanwhile(*_: object) -> None:
            monkeypatch.undo()
            first.promote(hashlib.sha256(b"abc").hexdigest())
            first.close()

        monkeypatch.setattr("app.contract.blobs.folder_partial.fcntl.flock", promoted_meanwhile)
        with pytest.raises(UploadLocked):
            folder.partial(upload_id)
        assert keys(folder) == {blob_key(hashlib.sha256(b"abc").hexdigest())}

    def test_no_byte_is_copied(self, folder: Blobs, upload_id: str, tmp_path: Path) -> None:
        partial = folder.partial(upload_id)
        partial.begin(0, 1)
        write(partial, b"abc")
        inode = (tmp_path / "uploads" / upload_id).stat().st_ino
        sha256 = hashlib.sha256(b"abc").hexdigest()
        partial.promote(sha256)
        partial.close()
        assert (tmp_path / blob_key(sha256)).stat().st_ino == inode

    def test_a_full_disk_is_told_as_such(self, folder: Blobs, upload_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("app.contract.blobs.folder_partial.os.fdatasync", full)
        partial = folder.partial(upload_id)
        partial.begin(0, 1)
        partial.write(b"abc")
        with pytest.raises(ServiceUnavailable, match="no room"):
            partial.seal()()
        partial.close()
