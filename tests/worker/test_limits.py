from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.contract.errors import OutOfMemory
from app.contract.records import Claim
from tests.worker.test_supervise import eventually
from worker import limits, messages, watch
from worker.child import _without_paths
from worker.forkserver import scrub_environment
from worker.scratch import WORK, printed, remove_stale, scratch_folder

MIB = 1 << 20


def test_the_memory_of_a_group_is_what_its_processes_hold_for_themselves() -> None:
    """64 MiB held in a forked child, which shares the parent's own 64 MiB: together 128 MiB and two interpreters."""
    code = (
        "import os, sys, time\n"
        "held = bytearray(b'x') * (64 << 20)\n"
        "if os.fork() == 0: more = bytearray(b'y') * (64 << 20)\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        try:
            members = limits.members(process.pid)
            assert (len(members), limits.threads_of(members)) == (2, 2)
            memory = [limits.memory_of(pid) for pid in members]
            assert 128 * MIB < sum(one.own for one in memory) < 160 * MIB
            assert sum(one.shared for one in memory) == 0
            most = [limits.most_memory_of(pid) for pid in members]
            assert 192 * MIB < sum(one.own for one in most) < 230 * MIB  # what is shared, twice
            for at_most, exactly in zip(most, memory, strict=True):
                assert at_most.own >= exactly.own
        finally:
            os.killpg(process.pid, 9)
    eventually(lambda: all(limits.memory_of(pid).own == limits.most_memory_of(pid).own == 0 for pid in members))


def test_shared_memory_is_counted_in_shares() -> None:
    """64 MiB that two processes share are 64 MiB; so are the three threads of the first."""
    code = (
        "import mmap, os, threading, time\n"
        "held = mmap.mmap(-1, 64 << 20); held.write(b'x' * (64 << 20))\n"
        "if os.fork() == 0: sum(held[::4096])\n"
        "else: [threading.Thread(target=time.sleep, args=(60,), daemon=True).start() for _ in range(2)]\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        try:
            members = limits.members(process.pid)
            assert limits.threads_of(members) == 4
            assert 62 * MIB < sum(limits.memory_of(pid).shared for pid in members) < 66 * MIB
            assert 124 * MIB < sum(limits.most_memory_of(pid).shared for pid in members) < 132 * MIB
        finally:
            os.killpg(process.pid, 9)


def test_a_setting_wins_over_a_share_of_the_machine() -> None:
    assert limits.memory_of_one_job(5, 2) == 5
    assert limits.memory_of_one_job(0, 2) == int(0.9 * limits.memory_of_machine() / 2)
    assert limits.threads_of_one_job(5, 2) == 5
    assert limits.threads_of_one_job(0, 10_000) == 1


def test_secrets_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("SOME_NEW_SERVICE_TOKEN", "secret")  # nobody can list them all
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    removed = scrub_environment()
    try:
        assert removed["AWS_SECRET_ACCESS_KEY"] == "secret"
        assert {"TERSOR_DATABASE_URL", "SOME_NEW_SERVICE_TOKEN"}.isdisjoint(os.environ)
        assert (os.environ["OMP_NUM_THREADS"], "PATH" in os.environ) == ("3", True)
    finally:
        os.environ.update(removed)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"null",
        b'{"kind": "progress", "progress": 2, "step": "x"}',
        b'{"kind": "progress", "progress": NaN, "step": "x"}',
        b'{"kind": "started", "extra": 1}',
        b'{"kind": "job_done", "report": {}, "artifacts": []}',
        b'{"kind": "unheard of"}',
        b"\x80\x04K\x01.",  # a pickle
    ],
)
def test_what_no_child_of_ours_says_is_refused(said: bytes) -> None:
    with pytest.raises(ValidationError):
        messages.parse(said)


def test_details_name_no_folder() -> None:
    text = "cannot read '/var/lib/tersor/scratch/job_1-1/model' here\nsecond line /etc/passwd"
    assert _without_paths(text) == "cannot read model' here"
    assert _without_paths("") == "no details"


def test_scratch_folders_go_with_their_owner(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    claim = Claim("job_1", "job", 1, "worker-1")
    with scratch_folder(root, claim) as folder:
        (folder / "file").write_text("x")
        stale = root / "job_2-1"
        stale.mkdir()
        (stale / "file").write_text("x")
        assert remove_stale(root) == 1
        assert sorted(path.name for path in root.iterdir()) == ["job_1-1"]
    assert list(root.iterdir()) == []


def test_what_was_printed_is_kept_in_part_and_steers_no_terminal(tmp_path: Path) -> None:
    assert printed(tmp_path) == ""
    (tmp_path / "log").write_bytes(b"x" * 5000 + b"\n\x1b[2Jdone \xff\n")
    text = printed(tmp_path)
    assert text.endswith("x\n\N{REPLACEMENT CHARACTER}[2Jdone \N{REPLACEMENT CHARACTER}")
    assert len(text) < 4096


def test_folders_nested_without_end_are_removed(tmp_path: Path) -> None:
    claim, root = Claim("job_1", "job", 1, "worker-1"), tmp_path / "scratch"
    with scratch_folder(root, claim) as folder:
        descriptor = os.open(folder / "work", os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=descriptor)
            deeper = os.open("d", os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
        os.close(descriptor)
    assert list(root.iterdir()) == []


def test_a_process_that_hides_its_details_is_counted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert limits.memory_of(os.getpid()).own > MIB


def test_pages_are_gone_through_only_where_counters_say_too_much(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []

    memory_of = limits.memory_of

    def noted(pid: int) -> limits.Memory:
        asked.append(pid)
        return memory_of(pid)

    monkeypatch.setattr(watch, "memory_of", noted)
    (tmp_path / WORK).mkdir()
    code = "print('up', flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            most = limits.most_memory_of(process.pid).own
            assert most > MIB
            for memory, expected in ((most + 64 * MIB, []), (MIB, [process.pid])):
                own = watch.Watch(tmp_path, limits.Limits(memory, 1 << 40, 60.0, 1, 64), "job")
                with pytest.raises(OutOfMemory) if expected else nullcontext():
                    own.check(process.pid)
                own.close()
                assert asked == expected
        finally:
            process.kill()


def test_a_process_may_call_itself_anything() -> None:
    code = r"import ctypes; ctypes.CDLL(None).prctl(15, b'\xff\xfe'); print('up', flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert b"\xff\xfe" in Path(f"/proc/{process.pid}/status").read_bytes()
            assert limits.most_memory_of(process.pid).own > MIB
        finally:
            process.kill()
