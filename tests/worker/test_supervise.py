"""One attempt, with real child processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from app.contract.blobs import checkpoint_key
from app.contract.errors import BlobMissing, Conflict, LeaseLost, NotFound
from app.contract.recipes import resolve
from app.contract.records import Claim, JobRecord
from app.contract.spec import JobSpec
from app.contract.states import JobState
from tests.worker.bench import ACCOUNT, Bench
from worker.lease import LeaseKeeper
from worker.process import TICK_SECONDS
from worker.supervise import Supervisor
from worker.watch import Watch

HANG_SECONDS = 90.0  # long past anything that these tests wait for


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.supervision.base.COPY_PAUSES", (0.01, 0.01))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def sleepers(bench: Bench) -> list[int]:
    """The numbers that the job `sleep` leaves, once it sleeps."""
    eventually(lambda: any(bench.settings.scratch.glob("*/work/pids")))
    (note,) = bench.settings.scratch.glob("*/work/pids")
    return [int(pid) for pid in note.read_text().split()]


class Sleeper:
    """A job whose child and grandchild sleep, supervised in a thread."""

    def __init__(self, bench: Bench, supervisor: Supervisor | None = None) -> None:
        self.bench = bench
        self.job = bench.submit(bench.ready_model())
        self.supervisor = supervisor or bench.supervisor(job="sleep")
        self.claim = bench.claim(self.job.id)
        self.thread = threading.Thread(target=self.supervisor.run, args=(self.claim,))

    def start(self) -> list[int]:
        self.thread.start()
        return sleepers(self.bench)

    def join(self) -> JobRecord:
        self.thread.join(HANG_SECONDS)
        assert not self.thread.is_alive()
        return self.bench.job(self.job.id)


def test_a_job_delivers_its_outputs_and_its_report(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_DATABASE_URL", "postgresql://secret")
    job = bench.run("succeed", b"some weights")
    assert (job.state, job.progress, job.warnings) == (JobState.SUCCEEDED, 1.0, ("mind the gap",))
    model, seen = bench.store.artifacts(ACCOUNT, job.id)
    assert (model.name, model.size_bytes, model.key) == ("model.bin", 12, f"jobs/{job.id}/1/model.bin")
    target = bench.settings.data_dir / "fetched"
    bench.blobs.fetch(model.key, target)
    assert target.read_bytes() == b"some weights"
    assert bench.store.report(ACCOUNT, job.id)["warnings"] == ["mind the gap"]
    target.unlink()
    bench.blobs.fetch(seen.key, target)
    assert target.read_text() == "[] True True ''"  # no secrets, its own TMPDIR, its own group, nothing to read


@pytest.mark.parametrize(
    ("entry", "code", "words"),
    [
        ("raise_ours", "training_diverged", "lower learning rate"),
        ("raise_bug", "job_failed", "RuntimeError: no such key in model"),
        ("raise_memory_error", "out_of_memory", "smaller batch size"),
        ("ask_torch_for_too_much", "out_of_memory", "smaller batch size"),
        ("die_by_signal", "crashed", "SIGSEGV"),
        ("die_by_kill", "out_of_memory", "system killed"),
        ("leave", "crashed", "exit code 3"),
        ("deliver_another_file", "export_failed", "no regular file"),
        ("deliver_a_bad_name", "export_failed", "unusable name"),
    ],
)
def test_what_goes_wrong_in_the_child_is_told(bench: Bench, entry: str, code: str, words: str) -> None:
    job = bench.run(entry)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == code
    assert words in job.error.detail
    assert str(bench.settings.data_dir) not in job.error.detail
    assert not list(bench.settings.data_dir.glob("blobs/jobs/*/*/*"))
    with pytest.raises(Conflict, match="failed"):
        bench.store.report(ACCOUNT, job.id)


def test_the_memory_of_the_whole_group_is_limited(tmp_path: Path) -> None:
    job = Bench(tmp_path, job_memory_bytes=256 << 20).run("allocate")  # 160 MiB each in child and grandchild
    assert job.error is not None
    assert job.error.code == "out_of_memory"
    assert "256 MiB" in job.error.detail


def test_the_size_of_a_file_is_limited(tmp_path: Path) -> None:
    job = Bench(tmp_path, job_disk_bytes=16 << 20).run("write_too_much")
    assert job.error is not None
    assert (job.error.code, "16777216 bytes" in job.error.detail) == ("job_failed", True)


def test_the_time_is_limited(tmp_path: Path) -> None:
    bench = Bench(tmp_path, job_timeout_seconds=1.0)
    sleeper = Sleeper(bench)
    pids = sleeper.start()
    job = sleeper.join()
    assert job.error is not None
    assert job.error.code == "timeout"
    eventually(lambda: all(gone(pid) for pid in pids))


def test_who_never_stops_talking_is_held_to_limits_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not looked at any more often: that takes milliseconds, of the child's too."""
    looked: list[float] = []
    check = Watch.check

    def counted(self: Watch, group: int) -> None:
        looked.append(time.monotonic())
        check(self, group)

    monkeypatch.setattr(Watch, "check", counted)
    job = Bench(tmp_path, job_timeout_seconds=2.0).run("chatter")
    assert job.error is not None
    assert job.error.code == "timeout"
    assert len(looked) > 1
    assert min(later - sooner for sooner, later in pairwise(looked)) > 0.9 * TICK_SECONDS


def test_progress_arrives_while_the_job_runs(bench: Bench) -> None:
    sleeper = Sleeper(bench)
    sleeper.start()
    eventually(lambda: bench.job(sleeper.job.id).step == "sleep")
    job = bench.job(sleeper.job.id)
    assert (job.state, job.progress) == (JobState.RUNNING, 0.25)
    assert job.eta_seconds is not None
    bench.store.request_cancel(ACCOUNT, job.id)
    sleeper.join()


def test_a_cancelled_job_ends_with_its_grandchild(bench: Bench) -> None:
    sleeper = Sleeper(bench)
    pids = sleeper.start()
    assert bench.store.request_cancel(ACCOUNT, sleeper.job.id).state is JobState.RUNNING
    job = sleeper.join()
    assert (job.state, job.error) == (JobState.CANCELLED, None)
    eventually(lambda: all(gone(pid) for pid in pids))  # the grandchild ignores SIGTERM


def test_a_worker_that_leaves_hands_the_job_back(bench: Bench) -> None:
    sleeper = Sleeper(bench)
    pids = sleeper.start()
    sleeper.supervisor.stopping.set()
    job = sleeper.join()
    assert (job.state, job.progress, job.step) == (JobState.QUEUED, 0.0, None)
    eventually(lambda: all(gone(pid) for pid in pids))
    bench.supervisor().run(bench.claim(job.id, "worker-2"))
    assert bench.job(job.id).state is JobState.SUCCEEDED


def test_a_lost_lease_ends_the_child_and_writes_nothing(bench: Bench) -> None:
    sleeper = Sleeper(bench)
    pids = sleeper.start()
    bench.store.release(sleeper.claim)  # as if another worker had taken it over
    other = bench.claim(sleeper.job.id, "worker-2")
    job = sleeper.join()
    eventually(lambda: all(gone(pid) for pid in pids))
    assert (job.state, job.attempt) == (JobState.RUNNING, other.attempt)
    with pytest.raises(LeaseLost):
        bench.store.heartbeat(sleeper.claim, 1.0)


def test_a_long_job_keeps_its_lease(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lease_seconds=0.6)
    sleeper = Sleeper(bench)
    sleeper.start()
    time.sleep(1.5)  # more than two leases
    assert bench.store.claim(sleeper.job.id, "worker-2", 1.0) is None
    bench.store.request_cancel(ACCOUNT, sleeper.job.id)
    assert sleeper.join().state is JobState.CANCELLED


def test_a_killed_worker_takes_its_children_along_and_the_job_runs_again(bench: Bench) -> None:
    job = bench.submit(bench.ready_model())
    code = (
        "import sys; from pathlib import Path; from tests.worker.bench import Bench\n"
        "bench = Bench(Path(sys.argv[1]), lease_seconds=1.0)\n"
        "bench.supervisor(job='sleep').run(bench.claim(sys.argv[2]))\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(bench.settings.data_dir), job.id])
    try:
        pids = sleepers(bench)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    eventually(lambda: all(gone(pid) for pid in pids))
    assert bench.job(job.id).state is JobState.RUNNING  # nobody has noticed yet
    eventually(lambda: bench.store.next_work(["job"]) == job.id)
    bench.supervisor().run(bench.claim(job.id, "worker-2"))
    finished = bench.job(job.id)
    assert (finished.state, finished.attempt) == (JobState.SUCCEEDED, 2)


def test_a_job_whose_bytes_are_gone_fails(bench: Bench) -> None:
    model = bench.ready_model()
    job = bench.submit(model)
    bench.blobs.delete(bench.blobs.blob_key(model.sha256))
    for _ in range(bench.settings.max_attempts):  # a store that hiccups may have them again
        assert bench.job(job.id).state is JobState.QUEUED
        bench.supervisor().run(bench.claim(job.id))
    error = bench.job(job.id).error
    assert error is not None
    assert error.code == BlobMissing.code


def test_others_see_nothing_of_it(bench: Bench) -> None:
    job = bench.run("succeed")
    with pytest.raises(NotFound):
        bench.store.artifacts("somebody else", job.id)


def test_a_copy_that_fails_once_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put_file, failures = bench.blobs.put_file, [OSError(5, "Input/output error")]

    def hiccup(path: Path, key: str) -> object:
        if key.startswith("jobs/") and failures:
            raise failures.pop()
        return put_file(path, key)

    monkeypatch.setattr(bench.blobs, "put_file", hiccup)
    job = bench.run("succeed")
    assert (job.state, job.attempt, failures) == (JobState.SUCCEEDED, 1, [])


def test_an_attempt_that_cannot_be_supervised_goes_back_at_once(bench: Bench) -> None:
    job = bench.submit(bench.ready_model())
    bench.settings.scratch.write_text("in the way of the folder")
    bench.supervisor().run(bench.claim(job.id))
    assert bench.job(job.id).state is JobState.QUEUED


def test_outputs_of_a_killed_attempt_are_removed_by_the_next(bench: Bench) -> None:
    job = bench.submit(bench.ready_model())
    killed = bench.claim(job.id)
    left = bench.settings.data_dir / "left"
    left.write_text("half of an artifact")
    key = bench.blobs.output_key(job.id, killed.attempt, "model.bin")
    bench.blobs.put_file(left, key)
    bench.store.release(killed)
    bench.supervisor().run(bench.claim(job.id))
    assert bench.job(job.id).state is JobState.SUCCEEDED
    assert not bench.blobs.exists(key)


class Checkpointed:
    """A job that has stored a checkpoint and sleeps, supervised in a thread."""

    def __init__(self, bench: Bench) -> None:
        self.job = bench.submit(bench.ready_model(b"sleep"))
        self.supervisor = bench.supervisor(job="checkpoint")
        self.thread = threading.Thread(target=self.supervisor.run, args=(bench.claim(self.job.id),))
        self.thread.start()
        eventually(lambda: bench.blobs.exists(checkpoint_key(self.job.id, 1, "training")))

    def join(self) -> None:
        self.thread.join(HANG_SECONDS)
        assert not self.thread.is_alive()


def test_the_next_attempt_gets_the_checkpoint_and_the_last_leaves_none(bench: Bench) -> None:
    running = Checkpointed(bench)
    running.supervisor.stopping.set()  # the worker leaves: the checkpoint stays
    running.join()
    assert bench.blobs.jobs_with_checkpoints() == {running.job.id}
    bench.supervisor(job="checkpoint").run(bench.claim(running.job.id, "worker-2"))
    assert bench.job(running.job.id).state is JobState.SUCCEEDED
    (artifact,) = bench.store.artifacts(ACCOUNT, running.job.id)
    target = bench.settings.data_dir / "fetched"
    bench.blobs.fetch(artifact.key, target)
    assert target.read_text() == '{"training": "after []"}'
    assert bench.blobs.jobs_with_checkpoints() == set()


def test_a_job_that_fails_or_is_cancelled_leaves_no_checkpoint(bench: Bench) -> None:
    assert bench.run("checkpoint", b"fail").state is JobState.FAILED
    running = Checkpointed(bench)
    bench.store.request_cancel(ACCOUNT, running.job.id)
    running.join()
    assert bench.job(running.job.id).state is JobState.CANCELLED
    assert bench.blobs.jobs_with_checkpoints() == set()


def test_a_checkpoint_that_cannot_be_had_sends_the_attempt_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.submit(bench.ready_model())
    bench.store.release(bench.claim(job.id))
    fetch = bench.blobs.fetch

    def fail(key: str, path: Path) -> None:
        if key.startswith("checkpoints/"):
            raise OSError(5, "Input/output error")
        fetch(key, path)

    monkeypatch.setattr(bench.blobs, "fetch", fail)
    bench.supervisor().run(bench.claim(job.id))
    assert bench.job(job.id).state is JobState.QUEUED
    monkeypatch.undo()
    bench.supervisor().run(bench.claim(job.id))
    assert bench.job(job.id).state is JobState.SUCCEEDED


def test_a_job_is_cancelled_when_nothing_of_it_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper, left = Sleeper(bench), []
    pids = sleeper.start()
    cancel = bench.store.cancel_job

    def look_and_cancel(claim: Claim) -> None:
        left.extend([*bench.settings.scratch.iterdir(), *(pid for pid in pids if not gone(pid))])
        cancel(claim)

    monkeypatch.setattr(bench.store, "cancel_job", look_and_cancel)
    bench.store.request_cancel(ACCOUNT, sleeper.job.id)
    assert sleeper.join().state is JobState.CANCELLED
    assert left == []


def test_a_keeper_that_meets_an_unforeseen_error_gives_the_lease_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = bench.claim(bench.submit(bench.ready_model()).id)

    def fail(*_: object) -> bool:
        raise RuntimeError("not an error of the database's")

    monkeypatch.setattr(bench.store, "heartbeat", fail)
    monkeypatch.setattr(bench.store, "cancel_requested", fail)
    with LeaseKeeper(bench.store, claim, 0.3) as keeper:
        eventually(lambda: keeper.verdict == "lost")


def test_a_job_gets_the_other_models_that_it_names(bench: Bench) -> None:
    teacher = bench.ready_model(b"a teacher's weights")
    step = {"technique": "finetune", "training": {"distill": {"teacher": ["uploaded", teacher.id]}}}
    spec = JobSpec.model_validate({"model": bench.ready_model().id, "steps": [step]})
    job = bench.store.add_job(ACCOUNT, spec, resolve(spec), None, None)[0]
    bench.supervisor(job="name_teachers").run(bench.claim(job.id))
    (artifact,) = bench.store.artifacts(ACCOUNT, job.id)
    target = bench.settings.data_dir / "delivered"
    bench.blobs.fetch(artifact.key, target)
    assert target.read_bytes() == teacher.id.encode() + b"=a teacher's weights"
