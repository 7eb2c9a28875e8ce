"""What has expired is removed, with its bytes, unless somebody needs them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from app.contract.blobs import Blobs, blob_key
from app.contract.blobs.partial import Partial
from app.contract.ids import new_id
from app.contract.records import ResumableRecord
from app.contract.resumable import remove_expired
from tests.contract.stage import ACCOUNT, Stage
from tests.contract.test_blobs import keys

DAY = 24 * 3600.0
DATA = b"bytes of a model"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["folder", "objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return Blobs.open(f"file://{tmp_path}/blobs") if request.param == "folder" else Blobs(MemoryStore())


def send(stage: Stage, blobs: Blobs, data: bytes, *, complete: bool) -> ResumableRecord:
    """An upload as the API makes it."""
    record = stage.store.add_resumable(ACCOUNT, new_id("upl"), "m", "", len(DATA), None, DAY, 9)
    partial = blobs.partial(record.id)
    held = stage.store.take_resumable(record.id, 30, partial.exclusive)
    partial.begin(0, held.attempt)
    partial.write(data)
    partial.seal()()
    held = stage.store.advance_resumable(held, len(data), DAY)
    if complete:
        held = stage.store.pin_resumable(held, SHA256)
        partial.promote(SHA256)
        held = stage.store.finish_resumable(held, DAY)
    stage.store.leave_resumable(held)
    partial.close()
    return held


def test_half_an_upload_goes_with_its_bytes(stage: Stage, blobs: Blobs) -> None:
    send(stage, blobs, DATA[:5], complete=False)
    stage.clock.pass_(DAY - 1)
    kept = send(stage, blobs, DATA[:5], complete=False)
    assert remove_expired(stage.store, blobs) == 0
    stage.clock.pass_(2)
    assert remove_expired(stage.store, blobs) == 1
    assert all(kept.id in key for key in keys(blobs))
    assert stage.store.get_resumable(ACCOUNT, kept.id).received == 5


@pytest.mark.parametrize("used", [False, True])
def test_a_finished_one_takes_its_blob_along_unless_it_is_used(stage: Stage, blobs: Blobs, used: bool) -> None:
    send(stage, blobs, DATA, complete=True)
    if used:
        stage.upload(sha256=SHA256)
    stage.clock.pass_(DAY + 1)
    assert remove_expired(stage.store, blobs) == 1
    assert keys(blobs) == ({blob_key(SHA256)} if used else set())


def test_one_that_is_being_written_is_left_alone(stage: Stage, blobs: Blobs) -> None:
    record = send(stage, blobs, DATA[:5], complete=False)
    partial = blobs.partial(record.id)
    stage.store.take_resumable(record.id, 2 * DAY, partial.exclusive)
    stage.clock.pass_(DAY + 1)
    assert remove_expired(stage.store, blobs) == 0
    assert keys(blobs)
    partial.close()


def test_a_removal_that_broke_off_is_done_again(stage: Stage, blobs: Blobs) -> None:
    record = send(stage, blobs, DATA[:5], complete=False)
    partial = blobs.partial(record.id)
    partial.discard()
    partial.close()
    stage.clock.pass_(DAY + 1)
    assert remove_expired(stage.store, blobs) == 1
    assert stage.store.expired_resumables(10) == []
    assert keys(blobs) == set()


def test_one_that_cannot_be_removed_keeps_none_of_the_others(
    stage: Stage, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = (send(stage, blobs, DATA[:5], complete=False) for _ in range(2))
    open_partial = type(blobs).partial

    def broken(store: Blobs, upload_id: str) -> Partial:
        if upload_id == stuck.id:
            raise PermissionError(13, "Permission denied")
        return open_partial(store, upload_id)

    monkeypatch.setattr(type(blobs), "partial", broken)
    stage.clock.pass_(DAY + 1)
    assert remove_expired(stage.store, blobs) == 1
    assert stage.store.expired_resumables(10) == [stuck.id]
    assert not any(other.id in key for key in keys(blobs))
    monkeypatch.undo()
    assert remove_expired(stage.store, blobs) == 1
