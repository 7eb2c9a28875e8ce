"""Slots, with a real store and work that a test holds back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.contract.records import Claim
from app.contract.states import JobState
from tests.worker.bench import Bench
from tests.worker.test_supervise import eventually
from worker.dispatcher import Dispatcher


class Gate:
    """Runs work by waiting until the test lets it through, then finishing it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._permits = threading.Semaphore(0)
        self.started: list[str] = []

    def __call__(self, claim: Claim) -> None:
        self.started.append(claim.work_id)
        assert self._permits.acquire(timeout=30)
        if claim.kind == "job":
            self._bench.store.finish_job(claim, {}, [], (), None)
        else:
            self._bench.store.finish_inspection(claim, self._bench.facts())

    def let_through(self, count: int) -> None:
        for _ in range(count):
            self._permits.release()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def gate(bench: Bench) -> Gate:
    return Gate(bench)


@pytest.fixture
def dispatcher(bench: Bench, gate: Gate) -> Iterator[Dispatcher]:
    made = Dispatcher(bench.store, gate, "worker-1", 30.0, 1)
    yield made
    made.refuse()
    gate.let_through(100)
    made.join(30)


def test_a_busy_worker_takes_the_next_job_when_it_is_done(bench: Bench, gate: Gate, dispatcher: Dispatcher) -> None:
    model = bench.ready_model()
    jobs = [bench.submit(model).id for _ in range(3)]
    for job in jobs:
        dispatcher.wake(job)
    eventually(lambda: gate.started == jobs[:1])
    gate.let_through(3)
    eventually(lambda: gate.started == jobs)
    eventually(lambda: all(bench.job(job).state is JobState.SUCCEEDED for job in jobs))


def test_an_inspection_does_not_wait_for_a_job(bench: Bench, gate: Gate, dispatcher: Dispatcher) -> None:
    job = bench.submit(bench.ready_model())
    dispatcher.wake(job.id)
    eventually(lambda: gate.started == [job.id])
    upload = bench.upload()
    dispatcher.wake(upload.id)
    eventually(lambda: gate.started == [job.id, upload.id])


def test_a_look_finds_what_no_message_told(bench: Bench, gate: Gate, dispatcher: Dispatcher) -> None:
    dispatcher.look()
    assert gate.started == []
    job = bench.submit(bench.ready_model())
    dispatcher.look()
    eventually(lambda: gate.started == [job.id])
    bench.submit(bench.ready_model())
    dispatcher.look()
    assert gate.started == [job.id]  # its one slot is taken


def test_messages_for_work_that_is_taken_or_unknown_are_harmless(
    bench: Bench, gate: Gate, dispatcher: Dispatcher
) -> None:
    job = bench.submit(bench.ready_model())
    bench.claim(job.id, "worker-2", 3600.0)
    for work_id in (job.id, "job_unknown", "nonsense"):
        dispatcher.wake(work_id)
    dispatcher.join(30)
    assert gate.started == []


def test_a_worker_that_refuses_starts_nothing(bench: Bench, gate: Gate, dispatcher: Dispatcher) -> None:
    dispatcher.refuse()
    dispatcher.wake(bench.submit(bench.ready_model()).id)
    dispatcher.look()
    assert gate.started == []


def test_a_slot_that_breaks_is_free_again(bench: Bench, gate: Gate) -> None:
    calls: list[str] = []

    def break_once(claim: Claim) -> None:
        calls.append(claim.work_id)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        gate.let_through(1)
        gate(claim)

    dispatcher = Dispatcher(bench.store, break_once, "worker-1", 30.0, 1)
    model = bench.ready_model()
    first, second = bench.submit(model), bench.submit(model)
    dispatcher.wake(first.id)
    eventually(lambda: calls == [first.id])
    dispatcher.join(30)
    dispatcher.wake(second.id)
    eventually(lambda: bench.job(second.id).state is JobState.SUCCEEDED)
    dispatcher.refuse()
    dispatcher.join(30)


def test_a_worker_leaves_while_a_slot_begins(
    bench: Bench, gate: Gate, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bell rings, and before its thread runs the worker is told to leave."""
    beginning = threading.Event()

    class Slow(threading.Thread):
        def start(self) -> None:
            beginning.set()
            time.sleep(0.2)
            super().start()

    job = bench.submit(bench.ready_model())
    bell = threading.Thread(target=dispatcher.wake, args=(job.id,))
    monkeypatch.setattr("worker.dispatcher.threading.Thread", Slow)
    bell.start()
    assert beginning.wait(10)
    dispatcher.refuse()
    gate.let_through(1)
    dispatcher.join(30)
    bell.join(10)
