"""Jobs whose trainings run in several processes, by a real supervisor, behind the walls."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.contract.optimizing import Ema
from app.contract.qat import Qat
from app.contract.records import JobRecord
from app.contract.spec import Finetune, Prune, Step
from app.contract.states import JobState
from app.contract.training import EarlyStopping, Training
from tests.worker.bench import Bench
from tests.worker.test_resuming import bench_in, delivered, eventually, in_the_last_step, submit, supervisor
from worker.limits import running

TWO = Training(epochs=4, lr=0.01, checkpoint_steps=3, processes=2)
LONG = Training(
    epochs=50, lr=0.003, checkpoint_steps=23, early_stopping=EarlyStopping(patience=50), averaging=Ema(), processes=2
)
LONG_STEPS: tuple[Step, ...] = (Prune(sparsity=0.5, training=TWO), Finetune(training=LONG))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = bench_in(tmp_path, threads=2)
    yield made
    made.store.close()


def ranks_of(bench: Bench, job_id: str) -> list[int]:
    """The processes that run the job, the first of them first."""
    group = next((p.pid for p in psutil.process_iter() if _works_on(p, job_id) and os.getpgid(p.pid) == p.pid), None)
    if group is None:
        return []
    return [group, *(child.pid for child in psutil.Process(group).children())]


def _works_on(process: psutil.Process, job_id: str) -> bool:
    try:
        return job_id in process.cwd()
    except psutil.Error:
        return False


def run(bench: Bench, steps: tuple[Step, ...]) -> JobRecord:
    job = submit(bench, steps)
    supervisor(bench).run(bench.claim(job.id))
    return bench.job(job.id)


def killed(bench: Bench, steps: tuple[Step, ...], which: int) -> JobRecord:
    """A job one of whose processes is killed in the middle of its last training."""
    job = submit(bench, steps)
    attempt = threading.Thread(target=supervisor(bench).run, args=(bench.claim(job.id),))
    attempt.start()
    eventually(lambda: in_the_last_step(bench, job.id))
    ranks = ranks_of(bench, job.id)
    assert len(ranks) == 2
    os.kill(ranks[which], signal.SIGKILL)
    attempt.join()
    assert not running(ranks[0])
    return bench.job(job.id)


JOBS = {
    "replicated": LONG_STEPS,
    "sharded": (LONG_STEPS[0], Finetune(training=LONG.model_copy(update={"sharded": True, "epochs": 20}))),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """The digest and the report of the steps of jobs that nothing happens to."""
    found = {}
    for name, steps in JOBS.items():
        bench = bench_in(tmp_path_factory.mktemp("whole"), threads=2)
        _, digest, told = delivered(bench, run(bench, steps).id)
        bench.store.close()
        found[name] = digest, told
    return found


@pytest.mark.parametrize(("name", "which"), [("replicated", 0), ("replicated", 1), ("sharded", 1)])
def test_a_killed_process_costs_neither_the_job_nor_its_bits(
    name: str, which: int, whole: dict[str, tuple[str, list[dict[str, Any]]]], bench: Bench
) -> None:
    expected, told = whole[name]
    job = killed(bench, JOBS[name], which)
    assert job.state is JobState.QUEUED
    eventually(lambda: bench.store.next_work(["job"]) == job.id)
    supervisor(bench).run(bench.claim(job.id, "worker-2"))
    record, found, steps = delivered(bench, job.id)
    assert (record.attempt, found) == (2, expected)
    assert steps[1]["details"].pop("training_resumed_at_step") > 0
    assert [step["details"] for step in steps] == [step["details"] for step in told]


def test_the_last_attempt_says_what_became_of_its_process(tmp_path: Path) -> None:
    bench = Bench(tmp_path, worker_threads=2, checkpoint_seconds=0.0, max_attempts=1)
    job = killed(bench, LONG_STEPS, 1)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.retryable) == ("rank_lost", True)
    assert job.error.detail == "Process 1 of the training ended by signal SIGKILL without a word."


STEPS: dict[str, tuple[Step, ...]] = {
    "one process among them": (
        Finetune(training=TWO),
        Finetune(training=TWO.model_copy(update={"processes": 1})),
        Prune(sparsity=0.3),
        Finetune(training=TWO),
        Finetune(training=TWO.model_copy(update={"processes": 1})),
    ),
    "found settings": (Finetune(training=Training(epochs=2, lr="auto", batch_size="auto", processes=2)),),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_several_processes_and_of_one(name: str, bench: Bench) -> None:
    record, _, steps = delivered(bench, run(bench, STEPS[name]).id)
    assert record.attempt == 1
    trained = [step["details"] for step in steps if step["technique"] == "finetune"]
    assert trained[-1]["training_last_epoch_loss"] < trained[0]["training_first_epoch_loss"]


def test_sharded_refuses_what_looks_at_whole_weights(bench: Bench) -> None:
    sharded = TWO.model_copy(update={"sharded": True})
    job = run(bench, (Prune(sparsity=0.5, schedule="cubic", training=sharded),))
    assert job.error is not None
    assert (job.error.code, job.error.pointer, "one_shot" in job.error.detail) == ("unsupported", "/steps/0", True)


def test_more_processes_than_threads_are_refused(bench: Bench) -> None:
    job = run(bench, (Finetune(training=Training(processes=3)),))
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.pointer) == ("unsupported", "/steps/0/training/processes")
    assert "processes can be 2 at most" in job.error.detail


def test_what_a_process_refuses_is_what_the_job_refuses(bench: Bench) -> None:
    """All of them meet it; the first one's word counts."""
    job = run(bench, (Finetune(training=TWO.model_copy(update={"precision": "fp16"})),))
    assert job.error is not None
    assert (job.error.code, job.error.pointer) == ("unsupported", "/steps/0")


@pytest.mark.parametrize(("bits", "export"), [(8, "onnx"), (4, "native")])
def test_processes_round_alike(bits: int, export: Any, bench: Bench) -> None:
    """Each finds the grids by itself; the training begins with those of the first, and checks after every epoch."""
    step = Qat.model_validate({"bits": bits, "training": {"epochs": 2, "processes": 2, "lr": 0.001}})
    job = submit(bench, (step,), (export,))
    supervisor(bench).run(bench.claim(job.id))
    _, _, told = delivered(bench, job.id)
    rows = told[0]["details"]["layers"]
    assert rows
    assert {row["bits"] for row in rows} == {bits}
