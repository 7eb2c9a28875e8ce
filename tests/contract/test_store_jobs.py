from __future__ import annotations

import pytest

from app.contract.errors import Conflict, IdempotencyKeyReused, NotFound, TrainingDiverged
from app.contract.recipes import resolve
from app.contract.records import ArtifactRecord, JobRecord
from app.contract.states import JobState
from tests.contract.stage import ACCOUNT, LEASE, Stage, at_once


def artifact(job: JobRecord, name: str = "model.onnx") -> ArtifactRecord:
    return ArtifactRecord(job.id, name, "onnx", 3, "b" * 64, "application/onnx", f"jobs/{job.id}/1/{name}")


def test_a_job_is_read_back_as_it_was_submitted(stage: Stage) -> None:
    spec = stage.spec()
    job = stage.job(spec)
    assert (job.spec, job.resolved) == (spec, resolve(spec))
    assert (job.state, job.progress, job.attempt, job.version) == (JobState.QUEUED, 0.0, 0, 1)
    assert (job.created_at, job.started_at, job.finished_at) == (stage.clock.moment, None, None)
    assert stage.look(job) == job
    assert stage.store.job_version(ACCOUNT, job.id) == 1


def test_it_is_nobody_elses(stage: Stage) -> None:
    job = stage.job()
    for call in (stage.store.get_job, stage.store.job_version, stage.store.request_cancel, stage.store.report):
        with pytest.raises(NotFound, match=job.id):
            call("mallory", job.id)
    assert stage.look(job).state is JobState.QUEUED


def test_the_same_key_gives_the_same_job(stage: Stage) -> None:
    spec = stage.spec()
    first, created = stage.store.add_job(ACCOUNT, spec, resolve(spec), "key", "print")
    again, created_again = stage.store.add_job(ACCOUNT, spec, resolve(spec), "key", "print")
    assert (created, created_again, again.id) == (True, False, first.id)
    with pytest.raises(IdempotencyKeyReused):
        stage.store.add_job(ACCOUNT, spec, resolve(spec), "key", "another print")
    _other, created = stage.store.add_job("bob", spec, resolve(spec), "key", "another print")
    assert created


def test_one_key_submitted_16_times_at_once_gives_one_job(stage: Stage) -> None:
    spec = stage.spec()
    results = at_once(16, lambda _: stage.store.add_job(ACCOUNT, spec, resolve(spec), "key", "print"))
    assert [result for result in results if isinstance(result, Exception)] == []
    assert len({result[0].id for result in results}) == 1  # type: ignore[index]
    assert sum(result[1] for result in results) == 1  # type: ignore[index]
    assert len(stage.store.list_jobs(ACCOUNT, None, None, 100)) == 1


def test_lists_are_newest_first_in_pages_and_by_state(stage: Stage) -> None:
    spec = stage.spec()
    made = [stage.job(spec) for _ in range(4)]
    stage.claim(made[0].id)
    first = stage.store.list_jobs(ACCOUNT, None, None, 3)
    assert [job.id for job in first] == [made[3].id, made[2].id, made[1].id]
    assert [job.id for job in stage.store.list_jobs(ACCOUNT, None, first[-1].id, 3)] == [made[0].id]
    assert [job.id for job in stage.store.list_jobs(ACCOUNT, JobState.RUNNING, None, 3)] == [made[0].id]


def test_the_place_in_the_queue_counts_everybodys_jobs(stage: Stage) -> None:
    spec = stage.spec()
    stage.job(spec, "bob")
    mine, last = stage.job(spec), stage.job(spec)
    assert (mine.queue_position, last.queue_position) == (2, 3)
    stage.claim(mine.id)
    assert (stage.look(mine).queue_position, stage.look(last).queue_position) == (None, 2)


def test_a_queued_job_is_cancelled_at_once_and_never_runs(stage: Stage) -> None:
    job = stage.job()
    cancelled = stage.store.request_cancel(ACCOUNT, job.id)
    assert (cancelled.state, cancelled.finished_at) == (JobState.CANCELLED, stage.clock.moment)
    assert cancelled.version > job.version
    assert stage.store.claim(job.id, "worker-1", LEASE) is None
    assert stage.store.request_cancel(ACCOUNT, job.id) == cancelled


def test_a_running_job_is_asked_to_end(stage: Stage) -> None:
    job = stage.job()
    claim = stage.claim(job.id)
    assert not stage.store.heartbeat(claim, LEASE)
    asked = stage.store.request_cancel(ACCOUNT, job.id)
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert stage.store.request_cancel(ACCOUNT, job.id).version == asked.version  # asking twice changes nothing
    assert stage.store.cancel_requested(claim)
    assert stage.store.heartbeat(claim, LEASE)
    stage.store.cancel_job(claim)
    assert stage.look(job).state is JobState.CANCELLED


@pytest.mark.parametrize("end", ["finish", "fail", "release"])
def test_a_request_to_cancel_wins_over_every_other_end(stage: Stage, end: str) -> None:
    job = stage.job()
    claim = stage.claim(job.id)
    stage.store.request_cancel(ACCOUNT, job.id)
    if end == "finish":
        assert stage.store.finish_job(claim, {}, [artifact(job)], (), None) is JobState.CANCELLED
    elif end == "fail":
        assert stage.store.fail_job(claim, TrainingDiverged().problem()) is JobState.CANCELLED
    else:
        stage.store.release(claim)
        assert stage.store.claim(job.id, "worker-2", LEASE) is None
    ended = stage.look(job)
    assert (ended.state, ended.error, ended.finished_at) == (JobState.CANCELLED, None, stage.clock.moment)
    assert not stage.store.has_delivered(claim)


def test_what_has_ended_cannot_be_cancelled(stage: Stage) -> None:
    job = stage.job()
    stage.store.finish_job(stage.claim(job.id), {}, [], (), None)
    with pytest.raises(Conflict, match="succeeded"):
        stage.store.request_cancel(ACCOUNT, job.id)


def test_a_result_is_published_whole(stage: Stage) -> None:
    job = stage.job()
    claim = stage.claim(job.id)
    with pytest.raises(Conflict, match="running"):
        stage.store.report(ACCOUNT, job.id)
    files = [artifact(job), artifact(job, "a.safetensors")]
    assert stage.store.finish_job(claim, {"a": [1.5]}, files, ("slow",), True) is JobState.SUCCEEDED
    ended = stage.look(job)
    assert (ended.state, ended.progress, ended.warnings, ended.goal_met) == (JobState.SUCCEEDED, 1.0, ("slow",), True)
    assert stage.store.has_delivered(claim)
    assert stage.store.report(ACCOUNT, job.id) == {"a": [1.5]}
    assert stage.store.artifacts(ACCOUNT, job.id) == sorted(files, key=lambda file: file.name)
    assert stage.store.artifact(ACCOUNT, job.id, "model.onnx") == files[0]
    with pytest.raises(NotFound, match="other"):
        stage.store.artifact(ACCOUNT, job.id, "other")


def test_a_failure_is_kept_with_its_problem(stage: Stage) -> None:
    job = stage.job()
    problem = TrainingDiverged().problem()
    assert stage.store.fail_job(stage.claim(job.id), problem) is JobState.FAILED
    assert stage.look(job).error == problem
    with pytest.raises(Conflict, match="failed"):
        stage.store.artifacts(ACCOUNT, job.id)
