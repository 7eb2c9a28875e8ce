from __future__ import annotations

import pytest

from app.contract.errors import LeaseLost, ModelRejected, NotFound
from app.contract.states import JobState, UploadStatus
from tests.contract.stage import ACCOUNT, DATASET_FACTS, LEASE, MODEL_FACTS, Stage


def test_an_upload_is_read_back_as_it_was_added(stage: Stage) -> None:
    added = stage.upload()
    found = stage.store.get_upload(ACCOUNT, added.id)
    assert found == added
    assert (found.status, found.spec, found.created_at) == (UploadStatus.INSPECTING, {"task": None}, stage.clock.moment)


def test_it_is_nobody_elses(stage: Stage) -> None:
    added = stage.upload()
    with pytest.raises(NotFound, match=added.id):
        stage.store.get_upload("mallory", added.id)
    assert stage.store.list_uploads("mallory", "model", None, 10) == []


def test_facts_make_it_ready(stage: Stage) -> None:
    model, dataset = stage.upload(), stage.upload("dataset")
    stage.ready(model)
    stage.ready(dataset)
    assert stage.store.get_upload(ACCOUNT, model.id).facts == MODEL_FACTS
    found = stage.store.get_upload(ACCOUNT, dataset.id)
    assert (found.status, found.facts) == (UploadStatus.READY, DATASET_FACTS)


def test_lists_are_newest_first_in_pages(stage: Stage) -> None:
    made = [stage.upload() for _ in range(5)]
    stage.upload("dataset")
    stage.ready(made[1])
    first = stage.store.list_uploads(ACCOUNT, "model", None, 2)
    assert [upload.id for upload in first] == [made[4].id, made[3].id]
    rest = stage.store.list_uploads(ACCOUNT, "model", first[-1].id, 10)
    assert [upload.id for upload in rest] == [made[2].id, made[1].id, made[0].id]
    ready = stage.store.list_uploads(ACCOUNT, "model", None, 10, UploadStatus.READY)
    assert [upload.id for upload in ready] == [made[1].id]


def test_jobs_wait_for_both_inspections(stage: Stage) -> None:
    model, dataset = stage.upload(), stage.upload("dataset")
    job = stage.job(stage.spec(model.id, dataset.id))
    assert stage.store.claim(job.id, "worker-1", LEASE) is None
    assert stage.store.due(stage.later(3600), 10) == sorted([model.id, dataset.id])  # but not the job
    assert stage.ready(model) == [job.id]
    assert stage.store.claim(job.id, "worker-1", LEASE) is None  # the dataset is not ready
    assert stage.ready(dataset) == [job.id]
    assert stage.store.due(stage.clock.moment, 10) == [job.id]  # due now
    stage.claim(job.id)


def test_a_rejection_fails_the_jobs_that_waited(stage: Stage) -> None:
    model = stage.upload()
    waiting, cancelled = stage.job(stage.spec(model.id)), stage.job(stage.spec(model.id))
    other = stage.job()
    stage.store.request_cancel(ACCOUNT, cancelled.id)
    problem = ModelRejected("truncated").problem()
    assert stage.store.finish_inspection(stage.claim(model.id), problem) == []
    record = stage.store.get_upload(ACCOUNT, model.id)
    assert (record.status, record.problem, record.facts) == (UploadStatus.REJECTED, problem, None)
    failed = stage.look(waiting)
    assert failed.error is not None
    assert (failed.state, failed.error.code) == (JobState.FAILED, "model_rejected")
    assert "truncated" in failed.error.detail
    assert failed.finished_at == stage.clock.moment
    assert failed.version > waiting.version
    assert stage.look(cancelled).state is JobState.CANCELLED
    assert stage.look(other).state is JobState.QUEUED
    assert stage.store.claim(waiting.id, "worker-1", LEASE) is None


def test_a_stale_inspection_changes_nothing(stage: Stage) -> None:
    model = stage.upload()
    stale = stage.claim(model.id)
    stage.clock.pass_(LEASE + 1)
    current = stage.claim(model.id, "worker-2")
    with pytest.raises(LeaseLost):
        stage.store.finish_inspection(stale, ModelRejected("x").problem())
    assert stage.store.get_upload(ACCOUNT, model.id).status is UploadStatus.INSPECTING
    stage.store.finish_inspection(current, MODEL_FACTS)


def test_a_file_that_kills_its_workers_is_rejected(stage: Stage) -> None:
    model = stage.upload()
    job = stage.job(stage.spec(model.id))
    for _ in range(3):
        stage.claim(model.id)
        stage.clock.pass_(LEASE + 1)
    assert stage.store.claim(model.id, "worker-1", LEASE) is None
    problem = stage.store.get_upload(ACCOUNT, model.id).problem
    assert problem is not None
    assert problem.code == "worker_lost"
    assert stage.look(job).state is JobState.FAILED


def test_a_blob_is_kept_until_all_that_refer_to_it_are_rejected(stage: Stage) -> None:
    digest = "a" * 64
    deleted: list[str] = []
    first, second = stage.upload(sha256=digest), stage.upload(sha256=digest)
    for upload in (first, second):
        stage.store.release_blob(digest, lambda: deleted.append("early"))
        stage.store.finish_inspection(stage.claim(upload.id), ModelRejected().problem())
    stage.store.release_blob(digest, lambda: deleted.append("at last"))
    assert deleted == ["at last"]
