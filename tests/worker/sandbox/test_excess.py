"""Too much of anything ends the job, and with it all that it started. Each attempt passes where enough is granted."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.contract.errors import JobFailed, OutOfMemory, ServiceUnavailable
from tests.worker.sandbox.cell import MIB, Cell
from worker import watch
from worker.limits import Limits
from worker.shared_memory import SharedMemory


def granted(cell: Cell, **limits: int) -> Cell:
    return dataclasses.replace(cell, limits=dataclasses.replace(cell.limits, **limits))


def test_a_fork_bomb_is_defused(cell: Cell) -> None:
    before = set(psutil.pids())
    began = time.monotonic()
    with pytest.raises(JobFailed, match=r"ran \d+ processes and threads; this worker grants 64"):
        granted(cell, processes=64).run("excess.fork_bomb")
    assert time.monotonic() - began < 30  # it forks for 4 s at most; then the machine has to breathe again
    left = [pid for pid in set(psutil.pids()) - before if _is_probe(pid)]
    assert left == []


def _is_probe(pid: int) -> bool:
    try:
        return psutil.Process(pid).cwd().endswith("job_probe-1/work")
    except psutil.Error:
        return False


@pytest.mark.parametrize("probe", ["many_processes", "many_threads"])
def test_processes_and_threads_are_limited(cell: Cell, probe: str) -> None:
    assert granted(cell, processes=256).run(f"excess.{probe}", 100) == "reached"
    with pytest.raises(JobFailed, match="processes and threads"):
        granted(cell, processes=64).run(f"excess.{probe}", 100)


@pytest.mark.parametrize("how", ["named", "deleted"])
def test_the_disk_is_limited_in_all(cell: Cell, how: str) -> None:
    """Twenty files of 8 MiB: none too large by itself; also where the file has lost its name and is open."""
    assert granted(cell, disk_bytes=200 * MIB).run("excess.fill", how, 20, 8 * MIB) == "reached"
    with pytest.raises(JobFailed, match=f"wrote more than {32 * MIB} bytes"):
        granted(cell, disk_bytes=32 * MIB).run("excess.fill", how, 20, 8 * MIB)
    assert not list((cell.outside / "scratch").glob("job_probe*"))


def test_ten_gigabytes_are_stopped_early(cell: Cell) -> None:
    """In files of 1 GiB, on a disk that could take them."""
    began = psutil.disk_usage(str(cell.folder)).used
    with pytest.raises(JobFailed, match="wrote more than"):
        granted(cell, disk_bytes=64 * MIB).run("excess.fill", "named", 200, 50 * MIB)
    assert psutil.disk_usage(str(cell.folder)).used - began < 5 << 30


def test_a_flood_of_empty_files_is_limited(cell: Cell) -> None:
    assert granted(cell, disk_bytes=32 * MIB).run("excess.empty_files", 4000) == "reached"
    with pytest.raises(JobFailed, match="wrote more than"):
        granted(cell, disk_bytes=8 * MIB).run("excess.empty_files", 4000)


def test_what_is_printed_is_limited_and_its_end_is_kept(cell: Cell) -> None:
    assert granted(cell, disk_bytes=64 * MIB).run("excess.print_for_ever", 20 * MIB) == "reached"
    assert set(cell.log) <= {"x"}
    quiet = granted(cell, disk_bytes=8 * MIB)
    assert quiet.run("excess.print_for_ever", 20 * MIB) == "refused: EFBIG"
    assert 0 < len(quiet.log) <= 4096
    assert "\x1b" not in quiet.log  # nothing that steers a terminal


@pytest.mark.parametrize(
    "probe", ["nest", pytest.param("unreadable", marks=pytest.mark.skipif(os.getuid() == 0, reason="root reads any"))]
)
def test_folders_that_cannot_be_counted_end_the_job(cell: Cell, probe: str) -> None:
    with pytest.raises(JobFailed, match="cannot be looked into"):
        cell.run(f"excess.{probe}")
    assert not list((cell.outside / "scratch").glob("job_probe*"))  # and are removed all the same


@pytest.mark.parametrize(("probe", "arguments"), [("fill", ("shared", 20, 8 * MIB)), ("two_mappings", (160 * MIB,))])
def test_shared_memory_counts(cell: Cell, probe: str, arguments: tuple[object, ...]) -> None:
    """160 MiB, in files of memory that nobody maps, and mapped."""
    before = set(os.listdir("/dev/shm"))
    assert cell.run(f"excess.{probe}", *arguments) == "reached"
    with pytest.raises(OutOfMemory, match="128 MiB"):
        granted(cell, memory_bytes=128 * MIB).run(f"excess.{probe}", *arguments)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("probe-")}


def test_nothing_is_left_in_shared_memory(cell: Cell) -> None:
    assert not Path(cell.run("excess.leave_in_shared_memory")).exists()


def test_what_others_have_in_shared_memory_stays() -> None:
    """New files that a living process holds open or has mapped, and old ones."""
    folder = Path("/dev/shm")
    code = (
        "import mmap, sys; path = sys.argv[1]\n"
        "opened = open(path + '-open', 'w'); mapped = open(path + '-mapped', 'w+b'); mapped.truncate(4096)\n"
        "held = mmap.mmap(mapped.fileno(), 4096); mapped.close(); open(path + '-left', 'w').close()\n"
        "print('up', flush=True); sys.stdin.read()\n"
    )
    old = folder / f"test-{os.getpid()}-old"
    old.touch()
    names = [folder / f"test-{os.getpid()}-{kind}" for kind in ("open", "mapped", "left")]
    try:
        shared = SharedMemory()
        command = [sys.executable, "-c", code, str(folder / f"test-{os.getpid()}")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            shared.remove_leftovers()
            assert [path.exists() for path in (*names, old)] == [True, True, False, True]
            process.communicate()
        shared.remove_leftovers()
        assert [path.exists() for path in (*names, old)] == [False, False, False, True]
    finally:
        for path in (*names, old):
            path.unlink(missing_ok=True)


def test_a_full_disk_is_the_workers_trouble(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(ServiceUnavailable, match="disk is full"):
        cell.run("excess.empty_files", 1)


def test_a_large_folder_is_counted_over_several_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SCAN_SECONDS", 0.0)  # one entry a look
    (tmp_path / "work").mkdir()
    for i in range(5):
        (tmp_path / "work" / str(i)).touch()
    watching = watch.Watch(tmp_path, Limits(1 << 40, 5 * 4096 - 1, 60, 1, 1 << 20), "job")
    nobody = 2**22
    for _ in range(4):
        watching.check(nobody)
    with pytest.raises(JobFailed, match="wrote more than"):
        watching.check(nobody)
    watching.close()
