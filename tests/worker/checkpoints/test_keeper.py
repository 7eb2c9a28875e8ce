"""What a child announces is stored, and nothing else is, whatever the child does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.contract.blobs import Blobs, Stored, checkpoint_key
from app.contract.errors import JobFailed
from app.contract.records import Claim
from app.contract.store import JobStore
from tests.worker.bench import ACCOUNT, Bench
from worker.checkpoints.keeper import CheckpointKeeper, fetch_earlier, remove_of_ended
from worker.messages import CheckpointWritten
from worker.scratch import WORK

JOB = "job_00000000000000000000000000"
HANG_SECONDS = 30.0


def claim(attempt: int) -> Claim:
    return Claim(JOB, "job", attempt, "worker-1")


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs.open(f"file://{tmp_path / 'blobs'}")


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    (tmp_path / "attempt" / WORK).mkdir(parents=True)
    return tmp_path / "attempt"


def stored(blobs: Blobs, number: int, kind: str = "training") -> bytes | None:
    key = checkpoint_key(JOB, number, kind)
    if not blobs.exists(key):
        return None
    root = Path(blobs._root)  # type: ignore[attr-defined]
    return (root / key).read_bytes()


def announce(keeper: CheckpointKeeper, attempt: Path, content: bytes, number: int = 1, kind: str = "training") -> None:
    name = f"checkpoint-{number}-{kind}"
    (attempt / WORK / name).write_bytes(content)
    keeper.offer(CheckpointWritten.model_validate({"of": kind, "name": name}))


def test_the_newest_of_each_kind_is_kept(blobs: Blobs, attempt: Path) -> None:
    with CheckpointKeeper(blobs, claim(1), attempt, 0.0) as keeper:
        for number in range(1, 4):
            announce(keeper, attempt, b"%d" % number, number)
            eventually(lambda number=number: stored(blobs, 1) == b"%d" % number)
        announce(keeper, attempt, b"between", 4, "step")
        eventually(lambda: stored(blobs, 1, "step") == b"between")
    assert stored(blobs, 1) == b"3"
    assert not any((attempt / WORK).iterdir())  # given away


def test_a_new_attempt_gets_the_newest_of_each_kind_and_replaces_it_by_its_own(
    blobs: Blobs, attempt: Path, tmp_path: Path
) -> None:
    with CheckpointKeeper(blobs, claim(1), attempt, 0.0) as keeper:
        announce(keeper, attempt, b"step of the first", 1, "step")
        announce(keeper, attempt, b"training of the first", 2)
        eventually(lambda: stored(blobs, 1) is not None and stored(blobs, 1, "step") is not None)
    with CheckpointKeeper(blobs, claim(2), attempt, 0.0) as keeper:
        announce(keeper, attempt, b"training of the second", 3)
        eventually(lambda: stored(blobs, 2) is not None and stored(blobs, 1) is None)
    found = fetch_earlier(blobs, claim(4), tmp_path)
    assert {kind: path.read_bytes() for kind, path in found.items()} == {
        "step": b"step of the first",
        "training": b"training of the second",
    }
    assert fetch_earlier(blobs, claim(1), tmp_path) == {}


def test_links_and_folders_are_not_followed(blobs: Blobs, attempt: Path, tmp_path: Path) -> None:
    """A child that was taken over may not have the worker read for it what it cannot read itself."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    tricks: list[Callable[[Path], None]] = [
        lambda path: path.symlink_to(secret),
        lambda path: os.link(secret, path),
        lambda path: (path / "deep").mkdir(parents=True),
        lambda path: os.mkfifo(path),
    ]
    with CheckpointKeeper(blobs, claim(1), attempt, 0.0) as keeper:
        for number, trick in enumerate(tricks, 1):
            path = attempt / WORK / f"checkpoint-{number}-step"
            trick(path)
            keeper.offer(CheckpointWritten(of="step", name=path.name))
            eventually(lambda path=path: not os.path.lexists(path))
        keeper.offer(CheckpointWritten(of="step", name="checkpoint-99-step"))  # which is not there
        announce(keeper, attempt, b"good", 100)
        eventually(lambda: stored(blobs, 1) == b"good")
    assert stored(blobs, 1, "step") is None
    assert secret.read_bytes() == b"secret"
    assert list(attempt.iterdir()) == [attempt / WORK]


@pytest.mark.parametrize("name", ["../secret", "checkpoint-1-step/../x", "checkpoint-1-other", "output"])
def test_other_names_are_no_announcements(name: str) -> None:
    with pytest.raises(ValueError):
        CheckpointWritten(of="step", name=name)


def test_a_store_that_fails_or_takes_its_time_holds_nobody_up(
    blobs: Blobs, attempt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file, go, busy = blobs.put_file, threading.Event(), threading.Event()
    calls = 0

    def slow(path: Path, key: str) -> Stored:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(28, "No space left on device")
        busy.set()
        go.wait(HANG_SECONDS)
        return put_file(path, key)

    monkeypatch.setattr(blobs, "put_file", slow)
    with CheckpointKeeper(blobs, claim(1), attempt, 0.0) as keeper:
        announce(keeper, attempt, b"lost", 1)
        eventually(lambda: calls == 1)
        announce(keeper, attempt, b"first", 2)
        assert busy.wait(HANG_SECONDS)
        for number in range(3, 9):
            announce(keeper, attempt, b"%d" % number, number)
        go.set()
        eventually(lambda: stored(blobs, 1) == b"8")
    assert calls == 3  # those between were overtaken


def test_those_of_jobs_that_have_ended_are_swept_away(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    store: JobStore = bench.store
    alive, queued, ended = (bench.submit(bench.ready_model()).id for _ in range(3))
    bench.claim(alive)
    store.fail_job(bench.claim(ended), JobFailed().problem())
    source = tmp_path / "checkpoint"
    source.write_bytes(b"x")
    for job in (alive, queued, ended, JOB):
        bench.blobs.put_file(source, checkpoint_key(job, 1, "training"))
    assert remove_of_ended(store, bench.blobs) == 2
    assert bench.blobs.jobs_with_checkpoints() == {alive, queued}
    assert store.get_job(ACCOUNT, ended).error is not None
    store.close()
