from __future__ import annotations

from itertools import pairwise

import pytest
from sqlalchemy import event, update

from app.contract.errors import LeaseLost, ModelRejected, TrainingDiverged, WorkerLost
from app.contract.records import Claim, JobRecord
from app.contract.spec import JobSpec
from app.contract.states import JobState, UploadStatus, may_become
from app.contract.tables import jobs
from tests.contract.stage import ACCOUNT, LEASE, Stage, at_once


def test_of_many_claimers_one_wins(stage: Stage) -> None:
    job = stage.job()
    results = at_once(12, lambda number: stage.store.claim(job.id, f"worker-{number}", LEASE))
    won = [result for result in results if result is not None]
    assert len(won) == 1
    assert isinstance(won[0], Claim)
    assert (won[0].attempt, won[0].kind) == (1, "job")
    assert stage.look(job).state is JobState.RUNNING


def test_of_many_claimers_of_an_expired_lease_one_wins(stage: Stage) -> None:
    job = stage.job()
    stage.claim(job.id)
    stage.clock.pass_(LEASE + 1)
    results = at_once(12, lambda number: stage.store.claim(job.id, f"late-{number}", LEASE))
    won = [result for result in results if result is not None]
    assert [claim.attempt for claim in won] == [2]  # type: ignore[union-attr]


def test_a_lease_lasts_as_long_as_it_is_renewed(stage: Stage) -> None:
    job = stage.job()
    claim = stage.claim(job.id)
    for _ in range(3):
        stage.clock.pass_(LEASE - 1)
        assert stage.store.claim(job.id, "worker-2", LEASE) is None
        stage.store.heartbeat(claim, LEASE)
    stage.clock.pass_(LEASE + 1)
    assert stage.claim(job.id, "worker-2").attempt == 2


@pytest.mark.parametrize("owner", ["worker-2", "worker-1"])
def test_a_stale_attempt_writes_nothing(stage: Stage, owner: str) -> None:
    """Also where the same worker holds the next attempt."""
    job = stage.job()
    stale = stage.claim(job.id)
    stage.clock.pass_(LEASE + 1)
    current = stage.claim(job.id, owner)
    before = stage.look(job)
    problem = TrainingDiverged().problem()
    for write in (
        lambda: stage.store.heartbeat(stale, LEASE, 0.9, "late"),
        lambda: stage.store.cancel_requested(stale),
        lambda: stage.store.finish_job(stale, {}, [], (), None),
        lambda: stage.store.fail_job(stale, problem),
        lambda: stage.store.cancel_job(stale),
        lambda: stage.store.release(stale),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert stage.look(job) == before
    stage.store.finish_job(current, {}, [], (), None)
    with pytest.raises(LeaseLost):
        stage.store.heartbeat(current, LEASE)  # it is done


def test_progress_grows_within_an_attempt_and_starts_afresh_with_the_next(stage: Stage) -> None:
    job = stage.job()
    claim = stage.claim(job.id)
    started = stage.look(job)
    stage.clock.pass_(10)
    stage.store.heartbeat(claim, LEASE, 0.5, "prune")
    stage.store.heartbeat(claim, LEASE, 0.4, "prune")
    halfway = stage.look(job)
    assert (halfway.progress, halfway.step, halfway.eta_seconds) == (0.5, "prune", 10.0)
    assert halfway.version > started.version
    stage.store.heartbeat(claim, LEASE)
    assert stage.look(job).version == halfway.version  # nothing changed for the client
    stage.clock.pass_(LEASE + 1)
    stage.claim(job.id, "worker-2")
    again = stage.look(job)
    assert (again.progress, again.step, again.attempt, again.started_at) == (0.0, None, 2, started.started_at)


def test_a_released_job_is_queued_and_the_attempt_does_not_count(stage: Stage) -> None:
    job = stage.job()
    for number in range(1, 6):  # more often than a job may lose its workers
        claim = stage.claim(job.id)
        assert claim.attempt == number
        stage.store.heartbeat(claim, LEASE, 0.5, "prune")
        stage.store.release(claim)
        assert stage.store.due(stage.clock.moment, 10) == [job.id]
    released = stage.look(job)
    assert (released.state, released.progress, released.step) == (JobState.QUEUED, 0.0, None)
    assert released.queue_position == 1


def test_a_job_that_loses_every_worker_fails(stage: Stage) -> None:
    job = stage.job()
    for _ in range(3):
        stage.claim(job.id)
        stage.clock.pass_(LEASE + 1)
    assert stage.store.claim(job.id, "worker-4", LEASE) is None
    failed = stage.look(job)
    assert failed.error is not None
    assert (failed.state, failed.error.code, failed.error.retryable) == (JobState.FAILED, "worker_lost", True)
    assert "3 times" in failed.error.detail
    assert stage.store.due(stage.later(3600), 10) == []


def test_a_job_to_cancel_whose_worker_was_lost_is_cancelled(stage: Stage) -> None:
    job = stage.job()
    stage.claim(job.id)
    stage.store.request_cancel(ACCOUNT, job.id)
    stage.clock.pass_(LEASE + 1)
    assert stage.store.due(stage.clock.moment, 10) == [job.id]
    assert stage.store.claim(job.id, "worker-2", LEASE) is None
    assert stage.look(job).state is JobState.CANCELLED


def test_work_that_nobody_hears_of_is_due_ever_more_rarely(stage: Stage) -> None:
    job = stage.job()
    start, heard = stage.clock.now, []
    while stage.clock.now < start + 2000:
        stage.clock.pass_(5)
        if stage.store.due(stage.clock.moment, 10):
            heard.append(stage.clock.now - start)
    assert heard[0] == 5  # who submitted rang already
    gaps = [later - earlier for earlier, later in pairwise(heard)]
    assert gaps[:5] == [10, 20, 40, 80, 160]
    assert set(gaps[6:]) <= {300}
    assert stage.claim(job.id).attempt == 1  # publishing is not claiming


def test_an_expired_lease_is_due_at_once(stage: Stage) -> None:
    job = stage.job()
    stage.claim(job.id)
    assert stage.store.due(stage.later(LEASE - 1), 10) == []
    stage.clock.pass_(LEASE + 1)
    assert stage.store.due(stage.clock.moment, 10) == [job.id]


def test_many_sweepers_publish_each_piece_once(stage: Stage) -> None:
    spec = stage.spec()
    made = sorted(stage.job(spec).id for _ in range(20))
    moment = stage.later(60)
    results = at_once(8, lambda _: stage.store.due(moment, 5))
    published = [id for result in results for id in result]  # type: ignore[union-attr]
    assert len(published) == len(set(published))
    assert sorted(published + [id for _ in range(4) for id in stage.store.due(moment, 5)]) == made


def test_next_work_is_the_oldest_that_can_be_claimed(stage: Stage) -> None:
    model = stage.upload()
    spec = stage.spec()
    waiting, first, second = stage.job(stage.spec(model.id)), stage.job(spec), stage.job(spec)
    assert stage.store.next_work(["model", "dataset"]) == model.id
    assert stage.store.next_work(["job"]) == first.id
    stage.claim(first.id)
    assert stage.store.next_work(["job"]) == second.id
    stage.claim(second.id)
    assert stage.store.next_work(["job"]) is None
    stage.ready(model)
    assert stage.store.next_work(["job"]) == waiting.id
    stage.claim(waiting.id)
    stage.clock.pass_(LEASE + 1)
    assert stage.store.next_work(["job"]) == waiting.id


def test_a_worker_gets_the_jobs_inputs(stage: Stage) -> None:
    model, dataset = stage.model(), stage.upload("dataset")
    stage.ready(dataset)
    job = stage.job(stage.spec(model.id, dataset.id))
    found, found_model, found_dataset = stage.store.job_inputs(stage.claim(job.id).work_id)
    assert found_dataset is not None
    assert (found.id, found_model.id, found_dataset.id) == (job.id, model.id, dataset.id)
    alone = stage.job(stage.spec(model.id))
    assert stage.store.job_inputs(stage.claim(alone.id).work_id)[2] is None


def distilling(stage: Stage, teacher: str) -> JobSpec:
    step = {"technique": "finetune", "training": {"distill": {"teacher": ["uploaded", teacher]}}}
    return JobSpec.model_validate({"model": stage.model().id, "steps": [step]})


def test_a_job_waits_for_a_teacher_and_gets_it(stage: Stage) -> None:
    teacher = stage.upload()
    job = stage.job(distilling(stage, teacher.id))
    assert stage.store.claim(job.id, "worker-1", LEASE) is None
    stage.clock.pass_(1000)
    assert job.id not in stage.store.due(stage.clock.moment, 10)
    assert stage.store.next_work(["job"]) is None
    assert stage.ready(teacher) == [job.id]
    claim = stage.claim(job.id)
    assert [one.id for one in stage.store.named_models(claim.work_id)] == [teacher.id]
    alone = stage.job()
    assert stage.store.named_models(stage.claim(alone.id).work_id) == []


def test_a_job_fails_with_its_teacher_and_others_do_not(stage: Stage) -> None:
    teacher = stage.upload()
    job, other = stage.job(distilling(stage, teacher.id)), stage.job()
    own = stage.job(stage.spec(teacher.id))
    stage.store.finish_inspection(stage.claim(teacher.id), ModelRejected("It is no model.").problem())
    found = stage.look(job)
    assert found.state is JobState.FAILED
    assert found.error is not None
    assert (found.error.code, found.error.pointer) == ("model_rejected", "/steps")
    assert teacher.id in found.error.detail
    failed = stage.look(own).error
    assert failed is not None
    assert failed.pointer == "/model"
    assert stage.look(other).state is JobState.QUEUED


def test_the_bytes_of_a_teacher_stay_while_a_job_needs_them(stage: Stage) -> None:
    teacher = stage.upload(sha256="a" * 64)
    stage.ready(teacher)
    stage.job(distilling(stage, teacher.id))
    deleted: list[str] = []
    stage.store.release_blob(teacher.sha256, lambda: deleted.append("teacher"))
    assert deleted == []


def test_an_inspection_is_never_cancelled(stage: Stage) -> None:
    upload = stage.upload()
    claim = stage.claim(upload.id)
    assert stage.store.upload_for(claim).id == upload.id
    assert stage.store.heartbeat(claim, LEASE, 0.5, "inspect") is False


def test_every_change_of_state_is_a_legal_one(stage: Stage) -> None:
    job = stage.job()
    seen = [job.state]

    def note() -> None:
        seen.append(stage.look(job).state)

    claim = stage.claim(job.id)
    note()
    stage.store.release(claim)
    note()
    claim = stage.claim(job.id)
    note()
    stage.store.finish_job(claim, {}, [], (), None)
    note()
    assert all(may_become(now, then) for now, then in pairwise(seen))


def test_claims_cancels_and_heartbeats_of_many_threads_do_not_block_each_other(stage: Stage) -> None:
    """Every one of these takes locks on work and job; taken in two orders they would deadlock on PostgreSQL."""
    spec = stage.spec()
    made = [stage.job(spec) for _ in range(4)]

    def churn(number: int) -> None:
        for job in made:
            claim = stage.store.claim(job.id, f"worker-{number}", LEASE)
            if number % 2:
                stage.store.request_cancel(ACCOUNT, job.id)
            if claim is not None:
                stage.store.heartbeat(claim, LEASE, 0.5, "x")
                stage.store.finish_job(claim, {}, [], (), None)

    results = at_once(8, churn)
    unexpected = [error for error in results if error is not None and "already" not in str(error)]
    assert unexpected == []
    assert all(stage.look(job).state in (JobState.SUCCEEDED, JobState.CANCELLED, JobState.QUEUED) for job in made)


def test_a_job_that_is_released_while_it_is_to_be_cancelled_ends(stage: Stage) -> None:
    job = stage.job()
    claim = stage.claim(job.id)
    stage.store.request_cancel(ACCOUNT, job.id)
    stage.store.release(claim)
    assert stage.store.request_cancel(ACCOUNT, job.id).state is JobState.CANCELLED
    assert stage.store.next_work(["job"]) is None


def test_a_retried_attempt_counts_and_the_last_one_ends_the_job(stage: Stage) -> None:
    job = stage.job()
    problem = WorkerLost("the store hiccups").problem()
    for _ in range(3):
        assert stage.look(job).state is JobState.QUEUED
        stage.store.retry(stage.claim(job.id), problem)
    assert (stage.look(job).state, stage.look(job).error) == (JobState.FAILED, problem)
    assert stage.store.next_work(["job"]) is None


def test_an_upload_that_cannot_be_inspected_is_rejected_in_the_end(stage: Stage) -> None:
    upload = stage.upload()
    job = stage.job(stage.spec(upload.id))
    for _ in range(3):
        assert stage.store.get_upload(ACCOUNT, upload.id).status is UploadStatus.INSPECTING
        stage.store.retry(stage.claim(upload.id), WorkerLost("the store hiccups").problem())
    record, error = stage.store.get_upload(ACCOUNT, upload.id), stage.look(job).error
    assert record.status is UploadStatus.REJECTED
    assert record.problem is not None
    assert error is not None
    assert (record.problem.code, error.code, error.retryable) == ("worker_lost", "worker_lost", True)


def test_inspections_come_by_age_and_not_by_kind(stage: Stage) -> None:
    model, dataset = stage.upload(), stage.upload("dataset")
    assert stage.store.next_work(["model", "dataset"]) == model.id
    stage.claim(model.id)
    assert stage.store.next_work(["model", "dataset"]) == dataset.id


def test_a_job_that_has_ended_does_not_start_again(stage: Stage) -> None:
    job = stage.job()
    with stage.store._write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(state=JobState.FAILED))
    assert stage.store.claim(job.id, "worker-1", LEASE) is None
    assert stage.look(job).state is JobState.FAILED
    assert stage.store.next_work(["job"]) is None


def test_a_job_that_is_submitted_during_a_rejection_is_failed_whole_or_not_at_all(stage: Stage) -> None:
    if stage.store._writer.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: nothing comes between two statements")
    upload = stage.upload()
    spec = stage.spec(upload.id)
    stage.job(spec)
    late: list[JobRecord] = []

    def submit(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE work") and "SELECT jobs.id" in statement and not late:
            late.append(stage.job(spec))

    claim = stage.claim(upload.id)
    event.listen(stage.store._writer, "after_cursor_execute", submit)
    stage.store.finish_inspection(claim, ModelRejected("no model").problem())
    assert stage.look(late[0]).state is JobState.QUEUED
    assert stage.store.next_work(["job"]) == late[0].id
