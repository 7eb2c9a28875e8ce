"""Inspections of uploads under a supervisor: what they leave, and what their own trouble must not cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.contract.states import JobState, UploadStatus
from tests.worker.bench import ACCOUNT, Bench
from tests.worker.test_supervise import bench, short_pauses

__all__ = ["bench", "short_pauses"]


def test_an_inspection_makes_an_upload_ready(bench: Bench) -> None:
    upload = bench.upload()
    job = bench.submit(upload)
    assert bench.store.claim(job.id, "worker-1", 1.0) is None  # it waits
    bench.supervisor().run(bench.claim(upload.id))
    record = bench.store.get_upload(ACCOUNT, upload.id)
    assert record.status is UploadStatus.READY
    assert record.facts is not None
    assert bench.store.next_work(["job"]) == job.id


def test_a_rejected_upload_keeps_no_bytes_and_fails_what_waited(bench: Bench) -> None:
    upload = bench.upload()
    job = bench.submit(upload)
    bench.supervisor(inspection="reject").run(bench.claim(upload.id))
    record = bench.store.get_upload(ACCOUNT, upload.id)
    assert record.status is UploadStatus.REJECTED
    assert record.problem is not None
    assert record.problem.code == "model_rejected"
    assert "ValueError: a bug met upload" in record.problem.detail
    assert not bench.blobs.exists(bench.blobs.blob_key(upload.sha256))
    failed = bench.job(job.id)
    assert failed.error is not None
    assert (failed.state, failed.error.code, failed.error.pointer) == (JobState.FAILED, "model_rejected", "/model")


def test_bytes_that_another_upload_needs_are_kept(bench: Bench) -> None:
    ready = bench.ready_model()
    rejected = bench.upload()
    bench.supervisor(inspection="reject").run(bench.claim(rejected.id))
    assert bench.blobs.exists(bench.blobs.blob_key(ready.sha256))


@pytest.mark.landlock
def test_jobs_and_inspections_are_shut_in_unless_told_otherwise(tmp_path: Path) -> None:
    for sandbox, reached in (("off", True), ("auto", False), ("require", False)):
        bench = Bench(tmp_path / sandbox, sandbox=sandbox)
        database = bench.settings.database.removeprefix("sqlite:///").encode()
        job = bench.run("peek", database)
        assert (job.state is JobState.SUCCEEDED) == reached
        upload = bench.upload(database)
        bench.supervisor(inspection="inspect_and_peek").run(bench.claim(upload.id))
        record = bench.store.get_upload(ACCOUNT, upload.id)
        assert (record.status is UploadStatus.READY) == reached
        for problem in (job.error, record.problem):
            assert reached or (
                problem is not None and "PermissionError: [Errno 13] Permission denied" in problem.detail
            )
        bench.store.close()


@pytest.mark.landlock
def test_an_inspection_has_no_shared_memory(bench: Bench) -> None:
    upload = bench.upload()
    bench.supervisor(inspection="inspect_and_share").run(bench.claim(upload.id))
    problem = bench.store.get_upload(ACCOUNT, upload.id).problem
    assert problem is not None
    assert "PermissionError" in problem.detail
    assert not Path("/dev/shm/probe").exists()


@pytest.mark.parametrize(
    ("entry", "code", "words"),
    [
        ("inspect_and_die", "worker_lost", "system killed"),
        ("inspect_on_a_full_disk", "service_unavailable", "No space left"),
    ],
)
def test_the_workers_own_trouble_costs_no_upload_its_bytes(bench: Bench, entry: str, code: str, words: str) -> None:
    upload = bench.upload()
    for _ in range(bench.settings.max_attempts):
        assert bench.store.get_upload(ACCOUNT, upload.id).status is UploadStatus.INSPECTING
        bench.supervisor(inspection=entry).run(bench.claim(upload.id))
    record = bench.store.get_upload(ACCOUNT, upload.id)
    assert record.status is UploadStatus.REJECTED
    assert record.problem is not None
    assert (record.problem.code, record.problem.retryable) == (code, True)
    assert words in record.problem.detail
    assert bench.blobs.exists(bench.blobs.blob_key(upload.sha256))
