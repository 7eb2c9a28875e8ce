from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta

import pytest

from app.contract.errors import BlobMissing, ModelRejected, NotFound, TooManyUploads, UploadLocked
from app.contract.ids import new_id
from app.contract.records import ResumableRecord
from tests.contract.stage import ACCOUNT, Stage, at_once

DAY = 24 * 3600.0
LEASE = 30.0
A, B = "a" * 64, "b" * 64


def create(
    stage: Stage, account: str = ACCOUNT, promised: str | None = None, max_open: int = 9, size: int = 100
) -> ResumableRecord:
    return stage.store.add_resumable(account, new_id("upl"), "m.bin", "filename bQ==", size, promised, DAY, max_open)


def finish(stage: Stage, record: ResumableRecord, sha256: str = A) -> ResumableRecord:
    held = stage.store.take_resumable(record.id, LEASE, False)
    held = stage.store.advance_resumable(held, held.size_bytes, DAY)
    return stage.store.finish_resumable(stage.store.pin_resumable(held, sha256), DAY)


def test_an_upload_is_read_back_as_it_was_added(stage: Stage) -> None:
    added = create(stage, promised=A)
    assert stage.store.get_resumable(ACCOUNT, added.id) == added
    assert (added.received, added.finished, added.sha256, added.promised_sha256) == (0, False, None, A)
    assert (added.created_at, added.expires_at) == (stage.clock.moment, stage.clock.moment + timedelta(days=1))
    large = create(stage, size=1 << 59)
    assert stage.store.get_resumable(ACCOUNT, large.id).size_bytes == 1 << 59


def test_it_is_nobody_elses(stage: Stage) -> None:
    added = create(stage, promised=A)
    with pytest.raises(NotFound, match=added.id):
        stage.store.get_resumable("mallory", added.id)
    assert stage.store.list_resumables("mallory", None, 10) == []
    assert stage.store.list_resumables("mallory", None, 10, A) == []


def test_lists_are_newest_first_in_pages_and_by_digest(stage: Stage) -> None:
    made = [create(stage, promised=A if number % 2 else None) for number in range(5)]
    first = stage.store.list_resumables(ACCOUNT, None, 2)
    assert [record.id for record in first] == [made[4].id, made[3].id]
    rest = stage.store.list_resumables(ACCOUNT, first[-1].id, 10)
    assert [record.id for record in rest] == [made[2].id, made[1].id, made[0].id]
    finish(stage, made[0], A)  # promised nothing, but turned out to be these bytes
    assert [record.id for record in stage.store.list_resumables(ACCOUNT, None, 10, A)] == [
        made[number].id for number in (3, 1, 0)
    ]
    assert stage.store.list_resumables(ACCOUNT, None, 10, B) == []


def test_unfinished_uploads_are_counted(stage: Stage) -> None:
    first = create(stage, max_open=2)
    create(stage, max_open=2)
    with pytest.raises(TooManyUploads, match="2 unfinished"):
        create(stage, max_open=2)
    create(stage, "bob", max_open=2)
    finish(stage, first)
    create(stage, max_open=2)  # a finished one does not count
    stage.clock.pass_(DAY + 1)
    create(stage, max_open=1)  # nor one that has expired


def test_many_at_once_stay_within_the_limit(stage: Stage) -> None:
    results = at_once(6, lambda _: create(stage, max_open=3))
    assert sum(isinstance(result, ResumableRecord) for result in results) == 3
    assert {type(result) for result in results} == {ResumableRecord, TooManyUploads}


def test_one_request_holds_it(stage: Stage) -> None:
    record = create(stage)
    results = at_once(5, lambda _: stage.store.take_resumable(record.id, LEASE, False))
    (held,) = [result for result in results if isinstance(result, ResumableRecord)]
    assert sum(isinstance(result, UploadLocked) for result in results) == 4
    assert held.attempt == 1
    stage.store.leave_resumable(held)
    assert stage.store.take_resumable(record.id, LEASE, False).attempt == 2


def test_a_lease_ends_unless_it_is_renewed(stage: Stage) -> None:
    record = create(stage)
    held = stage.store.take_resumable(record.id, LEASE, False)
    stage.clock.pass_(LEASE - 1)
    stage.store.renew_resumable(held, LEASE)
    stage.clock.pass_(LEASE - 1)
    with pytest.raises(UploadLocked):
        stage.store.take_resumable(record.id, LEASE, False)
    stage.clock.pass_(2)
    stage.store.take_resumable(record.id, LEASE, False)


def test_whoever_lost_the_hold_changes_nothing(stage: Stage) -> None:
    record = create(stage)
    stale = stage.store.take_resumable(record.id, LEASE, False)
    current = stage.store.advance_resumable(stage.store.take_resumable(record.id, LEASE, True), 40, DAY)
    for write in (
        lambda: stage.store.advance_resumable(stale, 50, DAY),
        lambda: stage.store.renew_resumable(stale, LEASE),
        lambda: stage.store.pin_resumable(stale, A),
        lambda: stage.store.finish_resumable(stale, DAY),
    ):
        with pytest.raises(UploadLocked):
            write()
    stage.store.leave_resumable(stale)
    stage.store.drop_resumable(stale, lambda sha256: pytest.fail("nothing is dropped"))
    with pytest.raises(UploadLocked):
        stage.store.take_resumable(record.id, LEASE, False)  # the lease of the current one holds
    assert stage.store.get_resumable(ACCOUNT, record.id) == current
    assert (current.received, current.attempt) == (40, 2)


def test_progress_moves_the_expiry(stage: Stage) -> None:
    record = create(stage)
    stage.clock.pass_(DAY - 1)
    held = stage.store.advance_resumable(stage.store.take_resumable(record.id, LEASE, False), 1, DAY)
    assert held.expires_at == stage.clock.moment + timedelta(days=1)
    stage.clock.pass_(DAY - 1)
    assert stage.store.get_resumable(ACCOUNT, record.id).received == 1


def test_an_expired_upload_is_only_there_to_be_removed(stage: Stage) -> None:
    record = create(stage)
    assert stage.store.expired_resumables(10) == []
    assert stage.store.take_expired(record.id, LEASE, True) is None
    held = stage.store.take_resumable(record.id, DAY * 2, False)
    stage.clock.pass_(DAY + 1)
    with pytest.raises(NotFound):
        stage.store.get_resumable(ACCOUNT, record.id)
    with pytest.raises(NotFound):
        stage.store.take_resumable(record.id, LEASE, False)
    assert stage.store.list_resumables(ACCOUNT, None, 10) == []
    assert stage.store.expired_resumables(10) == [record.id]
    assert stage.store.take_expired(record.id, LEASE, False) is None  # a request still holds it
    stage.store.leave_resumable(held)
    removed = stage.store.take_expired(record.id, LEASE, False)
    assert removed is not None
    stage.store.drop_resumable(removed, lambda sha256: pytest.fail("it has no blob"))
    assert stage.store.expired_resumables(10) == []


def test_a_digest_is_in_use_as_soon_as_it_is_known(stage: Stage) -> None:
    record = create(stage)
    held = stage.store.take_resumable(record.id, LEASE, False)
    stage.store.release_blob(A, deleted := Deleted())
    assert deleted.count == 1
    stage.store.pin_resumable(held, A)
    stage.store.release_blob(A, deleted)
    assert deleted.count == 1


class Deleted:
    """Counts deletions."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: str) -> None:
        self.count += 1


def test_the_last_one_out_deletes_the_blob(stage: Stage) -> None:
    deleted = Deleted()
    first, second = finish(stage, create(stage)), finish(stage, create(stage, "bob"))
    model = stage.upload(sha256=A)
    stage.store.drop_resumable(first, deleted)
    stage.store.drop_resumable(second, deleted)
    assert deleted.count == 0
    stage.store.finish_inspection(stage.claim(model.id), ModelRejected().problem())
    stage.store.release_blob(A, deleted)
    assert deleted.count == 1
    third = finish(stage, create(stage))
    stage.store.drop_resumable(third, deleted)
    assert deleted.count == 2


def test_an_account_holds_what_it_has_sent_itself(stage: Stage) -> None:
    holds = stage.store.holds_blob
    model = stage.upload(account="alice", sha256=A)
    assert (holds("alice", A), holds("bob", A), holds("alice", B)) == (True, False, False)
    stage.store.finish_inspection(stage.claim(model.id), ModelRejected().problem())
    assert not holds("alice", A)  # whether it is still there would tell of others
    record = create(stage, "bob")
    held = stage.store.take_resumable(record.id, LEASE, False)
    held = stage.store.pin_resumable(stage.store.advance_resumable(held, 100, DAY), A)
    assert not holds("bob", A)  # not in its place yet
    stage.store.finish_resumable(held, DAY)
    assert (holds("bob", A), holds("alice", A)) == (True, False)
    stage.clock.pass_(DAY + 1)
    assert not holds("bob", A)


def test_bytes_that_are_gone_are_not_recorded(stage: Stage) -> None:
    with pytest.raises(BlobMissing):
        stage.store.add_upload(ACCOUNT, "model", new_id("mdl"), "m", A, 5, {}, lambda: False)
    assert stage.store.list_uploads(ACCOUNT, "model", None, 10) == []
    assert stage.store.add_upload(ACCOUNT, "model", new_id("mdl"), "m", A, 5, {}, lambda: True).sha256 == A


@pytest.mark.parametrize("use", ["upload", "pin"])
def test_a_deletion_under_way_keeps_new_uses_waiting(stage: Stage, use: str) -> None:
    """Between the look for users and the deletion nobody becomes one unseen."""
    held = stage.store.take_resumable(create(stage).id, LEASE, False)
    present, deleting, told = True, threading.Event(), threading.Event()
    order: list[str] = []

    def delete() -> None:
        nonlocal present
        deleting.set()
        assert not told.wait(0.5)  # the other is still waiting
        present = False
        order.append("deleted")

    def begin_to_use() -> None:
        assert deleting.wait(10)
        if use == "upload":
            with pytest.raises(BlobMissing):
                stage.store.add_upload(ACCOUNT, "model", new_id("mdl"), "m", A, 5, {}, lambda: present)
        else:
            stage.store.pin_resumable(held, A)
        order.append("used")
        told.set()

    other = threading.Thread(target=begin_to_use)
    other.start()
    stage.store.release_blob(A, delete)
    other.join(10)
    assert order == ["deleted", "used"]


def test_a_use_under_way_keeps_a_deletion_waiting(stage: Stage) -> None:
    asked, deleted = threading.Event(), Deleted()

    def present() -> bool:
        asked.set()
        deleter.join(0.5)
        assert deleter.is_alive()
        return True

    def delete() -> None:
        assert asked.wait(10)
        stage.store.release_blob(A, deleted)

    deleter = threading.Thread(target=delete)
    deleter.start()
    stage.store.add_upload(ACCOUNT, "model", new_id("mdl"), "m", A, 5, {}, present)
    deleter.join(10)
    assert deleted.count == 0


def test_a_record_of_another_attempt_drops_nothing(stage: Stage) -> None:
    record = finish(stage, create(stage))
    stage.store.drop_resumable(replace(record, attempt=record.attempt + 1), lambda sha256: pytest.fail("dropped"))
    assert stage.store.get_resumable(ACCOUNT, record.id) == record
