"""Jobs over several hosts: workers of their own, with real supervisors and children behind the walls, over loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from app.contract.records import JobRecord
from app.contract.spec import Finetune, Step
from app.contract.states import JobState
from app.contract.training import Training
from tests.worker.bench import ACCOUNT, Bench
from tests.worker.test_resuming import delivered, eventually, in_the_last_step, submit, supervisor
from tests.worker.test_run_ranks import LONG_STEPS, STEPS
from worker.dispatcher import Dispatcher
from worker.ranks.meeting import LOOPBACK

# Another worker: it takes seats, and nothing else, until it is killed.
OTHER = """
import sys, time, pathlib
from tests.worker.test_run_hosts import Worker, bench_in
bench = bench_in(pathlib.Path(sys.argv[1]))
with Worker(bench, sys.argv[2]) as worker:
    time.sleep(600)
"""


def bench_in(folder: Path, **settings: Any) -> Bench:
    chosen = {"worker_threads": 1, "checkpoint_seconds": 0.0, "ranks_interface": LOOPBACK, "hosts_wait_seconds": 60.0}
    return Bench(folder, **(chosen | settings))


def over(hosts: int, steps: tuple[Step, ...], processes: int = 1, **changes: Any) -> tuple[Step, ...]:
    """The same steps, with those trainings over hosts that were in several processes."""
    found = []
    for step in steps:
        training = getattr(step, "training", None)
        if training is not None and training.processes > 1:
            own = training.model_copy(update={"hosts": hosts, "processes": processes, **changes})
            step = step.model_copy(update={"training": own})
        found.append(step)
    return tuple(found)


class Worker:
    """One that looks for work as a real one does: for seats alone, or for jobs too."""

    def __init__(self, bench: Bench, name: str, jobs: bool = False) -> None:
        self.supervisor = supervisor(bench)
        self._dispatcher = Dispatcher(
            bench.store, self.supervisor.run, name, bench.settings.lease_seconds, 1, seats=True
        )
        if not jobs:
            self._dispatcher._lanes[0].kinds = ("seat",)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stopping.wait(0.05):
            self._dispatcher.look()

    def __exit__(self, *_: object) -> None:
        self._dispatcher.refuse()
        self._stopping.set()
        self._thread.join()
        self._dispatcher.join(60.0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = bench_in(tmp_path)
    yield made
    made.store.close()


def led(bench: Bench, job: JobRecord, owner: str = "worker-1") -> None:
    supervisor(bench).run(bench.claim(job.id, owner))


def run(bench: Bench, steps: tuple[Step, ...], others: int = 1) -> JobRecord:
    job = submit(bench, steps)
    with ExitStack() as running:
        for index in range(others):
            running.enter_context(Worker(bench, f"other-{index}"))
        led(bench, job)
    return bench.job(job.id)


@contextmanager
def leading(bench: Bench, job: JobRecord) -> Iterator[threading.Thread]:
    attempt = threading.Thread(target=led, args=(bench, job))
    attempt.start()
    yield attempt
    attempt.join(60.0)
    assert not attempt.is_alive()


def children_of(bench: Bench, id: str) -> list[psutil.Process]:
    """The groups of processes that work in an attempt's folder, their first ones."""

    def works(process: psutil.Process) -> bool:
        try:
            return id in process.cwd() and os.getpgid(process.pid) == process.pid
        except (psutil.Error, ProcessLookupError):
            return False

    return [process for process in psutil.process_iter() if works(process)]


def nothing_is_left(bench: Bench, job: JobRecord) -> bool:
    return not children_of(bench, job.id) and not children_of(bench, f"sit_{job.id[4:]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What two processes of one host deliver, and the report of their steps."""
    bench = bench_in(tmp_path_factory.mktemp("whole"), worker_threads=2)
    job = submit(bench, LONG_STEPS)
    led(bench, job)
    _, digest, told = delivered(bench, job.id)
    bench.store.close()
    return digest, told


def details(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    own = ("training_hosts", "training_resumed_at_step")
    return [{key: value for key, value in step["details"].items() if key not in own} for step in steps]


def test_two_hosts_deliver_the_bits_of_two_processes(bench: Bench, whole: tuple[str, list[dict[str, Any]]]) -> None:
    expected, told = whole
    job = run(bench, over(2, LONG_STEPS))
    record, found, steps = delivered(bench, job.id)
    assert (record.attempt, found) == (1, expected)
    assert steps[1]["details"]["training_hosts"] == 2
    assert details(steps) == details(told)
    assert nothing_is_left(bench, job)
    assert not any(bench.settings.scratch.iterdir())


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_on_each_of_two_hosts(tmp_path: Path, sharded: bool) -> None:
    bench = bench_in(tmp_path, worker_threads=2)
    steps = over(2, STEPS["one process among them"], processes=2, sharded=sharded)
    record, _, told = delivered(bench, run(bench, steps).id)
    trained = [step["details"] for step in told if step["technique"] == "finetune"]
    assert record.attempt == 1
    assert trained[0]["training_processes"] == 4
    assert "training_processes" not in trained[1]
    assert trained[-1]["training_last_epoch_loss"] < trained[0]["training_first_epoch_loss"]
    bench.store.close()


@pytest.mark.slow
def test_three_hosts(bench: Bench) -> None:
    record, _, told = delivered(bench, run(bench, over(3, STEPS["found settings"]), others=2).id)
    assert (record.attempt, told[0]["details"]["training_hosts"]) == (1, 3)


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param("a seat's process", marks=pytest.mark.slow),
        pytest.param("the leader's process", marks=pytest.mark.slow),
        "a seat's worker",
    ],
)
def test_whoever_is_lost_costs_neither_the_job_nor_its_bits(
    lost: str, bench: Bench, whole: tuple[str, list[dict[str, Any]]]
) -> None:
    expected, told = whole
    job = submit(bench, over(2, LONG_STEPS))
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(bench.settings.data_dir), "other"])
    try:
        with leading(bench, job):
            eventually(lambda: in_the_last_step(bench, job.id))
            if lost == "a seat's worker":
                other.kill()
            else:
                (process,) = children_of(bench, f"sit_{job.id[4:]}" if lost == "a seat's process" else job.id)
                process.send_signal(signal.SIGKILL)
    finally:
        other.kill()
        other.wait()
    assert bench.job(job.id).state is JobState.QUEUED
    eventually(lambda: nothing_is_left(bench, job))
    with Worker(bench, "third"):
        led(bench, job, "worker-2")
    record, found, steps = delivered(bench, job.id)
    assert (record.attempt, found) == (2, expected)
    assert steps[1]["details"]["training_resumed_at_step"] > 0
    assert details(steps) == details(told)


def test_the_last_attempt_says_what_became_of_the_other_host(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, max_attempts=1)
    job = submit(bench, over(2, LONG_STEPS))
    with Worker(bench, "other"), leading(bench, job):
        eventually(lambda: in_the_last_step(bench, job.id))
        (process,) = children_of(bench, f"sit_{job.id[4:]}")
        process.send_signal(signal.SIGKILL)
    error = bench.job(job.id).error
    assert error is not None
    assert (error.code, error.retryable) == ("rank_lost", True)
    assert error.detail.startswith("Host 1 of the training: ")
    bench.store.close()


def test_a_worker_that_leaves_costs_no_attempt(bench: Bench) -> None:
    job = submit(bench, over(2, LONG_STEPS))
    with Worker(bench, "other") as other, leading(bench, job):
        eventually(lambda: in_the_last_step(bench, job.id))
        other.supervisor.stopping.set()
    assert bench.job(job.id).state is JobState.QUEUED
    assert tries(bench, job) == 0


def tries(bench: Bench, job: JobRecord) -> int:
    with bench.store._read() as connection:
        found = connection.exec_driver_sql(f"SELECT tries FROM work WHERE id = '{job.id}'")
        return int(found.scalar_one())


def test_a_job_that_is_cancelled_ends_everywhere(bench: Bench) -> None:
    job = submit(bench, over(2, LONG_STEPS))
    with Worker(bench, "other"), leading(bench, job):
        eventually(lambda: in_the_last_step(bench, job.id))
        bench.store.request_cancel(ACCOUNT, job.id)
        eventually(lambda: nothing_is_left(bench, job))
    assert bench.job(job.id).state is JobState.CANCELLED


def test_what_another_host_refuses_the_job_refuses(bench: Bench) -> None:
    steps = (Finetune(training=Training(hosts=2, precision="fp16")),)
    error = run(bench, steps).error
    assert error is not None
    assert (error.code, error.pointer) == ("unsupported", "/steps/0")


def test_too_few_workers_are_said(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, hosts_wait_seconds=1.0)
    job = submit(bench, (Finetune(training=Training(hosts=3)),))
    with Worker(bench, "other"):
        led(bench, job)
    error = bench.job(job.id).error
    assert error is not None
    assert (error.code, error.pointer, error.retryable) == ("hosts_missing", "/steps/0/training/hosts", True)
    assert error.detail.startswith("2 of 3 workers took part")
    bench.store.close()


def test_without_an_interface_there_are_no_several_hosts(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, ranks_interface="")
    job = submit(bench, (Finetune(training=Training(hosts=2)),))
    led(bench, job)
    error = bench.job(job.id).error
    assert error is not None
    assert (error.code, error.pointer) == ("unsupported", "/steps/0/training/hosts")
    assert "TERSOR_RANKS_INTERFACE" in error.detail
    bench.store.close()


def test_leaders_that_wait_for_each_other_do_not_wait_for_ever(bench: Bench) -> None:
    """Each of two workers has claimed a job that needs the other one; the younger job's gives way."""
    steps = over(2, STEPS["one process among them"])
    jobs = [submit(bench, steps) for _ in range(2)]
    claims = [bench.claim(job.id, f"worker-{index}") for index, job in enumerate(jobs)]
    threads = [threading.Thread(target=supervisor(bench).run, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    # What its dispatcher does for the worker whose leader gave way.
    eventually(lambda: bench.job(jobs[1].id).state is JobState.QUEUED)
    threads[1].join()
    with Worker(bench, "worker-1", jobs=True), Worker(bench, "worker-2", jobs=True):
        eventually(lambda: all(bench.job(job.id).finished_at is not None for job in jobs))
    threads[0].join()
    for job in jobs:
        delivered(bench, job.id)
