from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import Column, MetaData, Table, create_engine, insert, select

from app.contract.errors import ModelRejected, NotFound
from app.contract.records import WorkerRecord
from app.contract.states import JobState, UploadStatus
from app.contract.tables import UtcDateTime
from tests.contract.stage import Stage, at_once


def worker(stage: Stage, name: str = "host-1") -> WorkerRecord:
    return WorkerRecord(name, "host", 1, ("cpu", "gpu"), stage.clock.moment)


def test_workers_live_as_long_as_they_are_seen(stage: Stage) -> None:
    stage.store.worker_seen(worker(stage))
    assert stage.store.live_workers(10) == [worker(stage)]
    stage.clock.pass_(11)
    assert stage.store.live_workers(10) == []
    stage.store.worker_seen(worker(stage))
    assert stage.store.live_workers(10) == [worker(stage)]
    stage.store.worker_gone("host-1")
    assert stage.store.live_workers(10) == []


def test_a_worker_says_which_walls_it_has(stage: Stage) -> None:
    walls = WorkerRecord("host-1", "host", 1, ("cpu",), stage.clock.moment, "on (walls)")
    stage.store.worker_seen(walls)
    assert stage.store.live_workers(10) == [walls]


def test_a_worker_may_be_seen_for_the_first_time_twice_at_once(stage: Stage) -> None:
    assert at_once(8, lambda _: stage.store.worker_seen(worker(stage))) == [None] * 8
    assert len(stage.store.live_workers(10)) == 1


def test_a_key_opens_its_account(stage: Stage) -> None:
    record, secret = stage.store.create_key("alice", "laptop")
    start, prefix, rest = secret.split("_", 2)
    assert (start, prefix, len(prefix), len(rest)) == ("tsr", record.prefix, 8, 43)
    assert stage.store.authenticate(secret) == "alice"


@pytest.mark.parametrize("change", ["other secret", "other prefix", "no prefix", "empty", "not ascii"])
def test_anything_else_opens_nothing(stage: Stage, change: str) -> None:
    record, secret = stage.store.create_key("alice", "laptop")
    wrong = {
        "other secret": secret[:-1] + ("A" if secret[-1] != "A" else "B"),
        "other prefix": secret.replace(record.prefix, "00000000"),
        "no prefix": "tsr_" + secret.split("_", 2)[2],
        "empty": "",
        "not ascii": secret + "é",
    }[change]
    assert stage.store.authenticate(wrong) is None


def test_a_secret_is_not_kept(stage: Stage) -> None:
    _, secret = stage.store.create_key("alice", "laptop")
    (listed,) = stage.store.list_keys()
    assert secret.split("_", 2)[2] not in repr(listed)


def test_a_revoked_key_opens_nothing(stage: Stage) -> None:
    record, secret = stage.store.create_key("alice", "laptop")
    stage.store.revoke_key(record.id)
    revoked_at = stage.clock.moment
    assert stage.store.authenticate(secret) is None
    stage.clock.pass_(60)
    stage.store.revoke_key(record.id)
    assert stage.store.list_keys()[0].revoked_at == revoked_at
    with pytest.raises(NotFound):
        stage.store.revoke_key("key_none")


def test_the_last_use_is_noted_once_a_minute(stage: Stage) -> None:
    _, secret = stage.store.create_key("alice", "laptop")
    assert stage.store.list_keys()[0].last_used_at is None
    stage.store.authenticate(secret)
    first = stage.clock.moment
    stage.clock.pass_(59)
    stage.store.authenticate(secret)
    assert stage.store.list_keys()[0].last_used_at == first
    later = stage.clock.pass_(1)
    stage.store.authenticate(secret)
    assert stage.store.list_keys()[0].last_used_at == later


def test_counts(stage: Stage) -> None:
    inspecting, rejected = stage.upload(), stage.upload("dataset")
    stage.store.finish_inspection(stage.claim(rejected.id), ModelRejected().problem())
    spec = stage.spec()
    running, _queued, _waits = stage.job(spec), stage.job(spec), stage.job(stage.spec(inspecting.id))
    stage.claim(running.id)
    assert stage.store.job_counts() == dict.fromkeys(JobState, 0) | {JobState.RUNNING: 1, JobState.QUEUED: 2}
    assert stage.store.upload_counts() == {
        ("model", UploadStatus.INSPECTING): 1,
        ("model", UploadStatus.READY): 1,
        ("dataset", UploadStatus.REJECTED): 1,
    }
    assert stage.store.queue_depth() == 2  # the queued job, and the model to inspect


def test_times_are_utc_and_carry_it() -> None:
    table = Table("t", MetaData(), Column("at", UtcDateTime))
    engine = create_engine("sqlite://")
    moment = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(insert(table).values(at=moment))
        found = connection.execute(select(table.c.at)).scalar_one()
        assert (found, found.utcoffset(), found.hour) == (moment, timedelta(0), 10)
        with pytest.raises(Exception, match="time zone"):
            connection.execute(insert(table).values(at=datetime(2026, 1, 1)))
    assert found.tzinfo is UTC
