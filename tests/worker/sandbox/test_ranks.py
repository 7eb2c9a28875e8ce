"""The network of a job of several processes: they reach each other, and none of them anything else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker.sandbox.cell import Cell

pytestmark = [pytest.mark.seccomp, pytest.mark.landlock]
KERNELS: dict[str, dict[str, Any]] = {"this kernel": {}, "oldest Landlock": {"newest_landlock": 1}}
on_old_and_new = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@pytest.fixture
def port() -> Iterator[int]:
    """Where somebody of the same machine listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@on_old_and_new
@pytest.mark.parametrize("probe", ["network.connect_tcp", "network.send_udp"])
def test_they_reach_nobody_else(probe: str, cell: Cell, port: int, kernel: dict[str, Any]) -> None:
    refused = "refused: EACCES"
    assert cell.run("ranks.both", probe, port, ranks=True, **kernel) == f"{refused}, {refused}, 3"
    assert cell.run("ranks.both", probe, port, walls=False) == "reached, reached, 3"


@on_old_and_new
@pytest.mark.parametrize("probe", ["ranks.send_elsewhere", "ranks.connect_elsewhere"])
def test_their_connections_are_not_turned_to_others(probe: str, cell: Cell, port: int, kernel: dict[str, Any]) -> None:
    """Without walls the kernel would take them for news to their peers, or say that they are connected."""
    refused = "refused: EACCES"
    assert cell.run("ranks.both", probe, port, ranks=True, **kernel) == f"{refused}, {refused}, 3"


@on_old_and_new
def test_nobody_reaches_them(cell: Cell, kernel: dict[str, Any]) -> None:
    assert cell.run("ranks.both", "ranks.listening", ranks=True, **kernel) == "0, 0, 3"
    assert cell.run("ranks.both", "network.listen_tcp", ranks=True, **kernel) == "refused: EACCES, refused: EACCES, 3"
    assert cell.run("ranks.both", "ranks.connected", ranks=True, **kernel) == "127.0.0.1, 127.0.0.1, 3"


@pytest.mark.parametrize(
    "probe", ["network.connect_tcp", "network.send_udp", "ranks.send_elsewhere", "ranks.connect_elsewhere"]
)
def test_those_of_several_hosts_reach_nobody_else(probe: str, cell: Cell, port: int) -> None:
    refused = "refused: EACCES"
    assert cell.run("ranks.apart", probe, port, ranks=True) == f"{refused}, {refused}, 3"
    if probe.startswith("network"):
        assert cell.run("ranks.apart", probe, port, walls=False) == "reached, reached, 3"


def test_nobody_reaches_those_of_several_hosts(cell: Cell) -> None:
    assert cell.run("ranks.apart", "ranks.listening", ranks=True) == "0, 0, 3"
    assert cell.run("ranks.apart", "ranks.listening", walls=False) == "1, 1, 3"
    assert cell.run("ranks.apart", "ranks.connections", ranks=True) == "2, 2, 3"  # gloo's, and a line
    assert cell.run("ranks.apart", "network.listen_tcp", ranks=True) == "refused: EACCES, refused: EACCES, 3"


def test_without_walls_they_go_on_listening(cell: Cell) -> None:
    """The same probe sees a listener where there is one."""
    assert cell.run("ranks.both", "ranks.listening", walls=False) == "1, 1, 3"


def test_a_stranger_that_was_quick_enough_ends_it(cell: Cell, port: int) -> None:
    """A connection that is none of theirs would stay open for as long as the job runs."""
    with pytest.raises(AssertionError, match="2 connections where the processes of the job make 1"):
        cell.run("ranks.with_a_stranger", port, ranks=True)


@on_old_and_new
def test_every_other_wall_stands_around_each_of_them(cell: Cell, kernel: dict[str, Any]) -> None:
    refused = "refused: EACCES"
    key = str(cell.outside / "key")
    assert cell.run("ranks.both", "files.read", key, ranks=True, **kernel) == f"{refused}, {refused}, 3"
    said = cell.run("ranks.both", "network.connect_unix", str(cell.outside / "x"), ranks=True, **kernel)
    assert said == f"{refused}, {refused}, 3"


@on_old_and_new
def test_a_job_of_one_process_has_no_network_at_any_time(cell: Cell, kernel: dict[str, Any]) -> None:
    """Not even to its own other processes: the very same connecting fails."""
    with pytest.raises(AssertionError, match="could not be connected"):
        cell.run("ranks.both", "ranks.listening", **kernel)


def test_the_wait_for_the_others_has_an_end(cell: Cell, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="could not be connected"):
        cell.run("ranks.alone", ranks=True)
