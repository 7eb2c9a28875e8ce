"""Lines between hosts: they find each other, and nobody else gets one."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest
import torch

from tests.worker.ranks.together import apart
from tests.worker.ranks.works import exchanged
from worker.ranks.lines import Lines
from worker.ranks.meeting import LOOPBACK, Meeting, Place
from worker.ranks.remote import Card, Remote, address_of


def remotes(folder: Path, hosts: int = 2) -> list[Remote]:
    places = [Place(1, folder, host, hosts, None, LOOPBACK, 10.0) for host in range(hosts)]
    meeting = Meeting(folder / "ranks")
    return [Remote(host, place, meeting) for host, place in enumerate(places)]


def connected(made: list[Remote]) -> list[dict[int, socket.socket]]:
    found: list[dict[int, socket.socket]] = [{} for _ in made]

    def connect(rank: int) -> None:
        found[rank] = made[rank].connected()

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return found


def test_each_has_a_line_to_each(tmp_path: Path) -> None:
    lines = connected(remotes(tmp_path, 3))
    assert [sorted(own) for own in lines] == [[1, 2], [0, 2], [0, 1]]
    for rank, own in enumerate(lines):
        for other, line in own.items():
            line.sendall(bytes([rank]))
            assert lines[other][rank].recv(1) == bytes([rank])


def test_strangers_are_hung_up_on(tmp_path: Path) -> None:
    """They call first: one says nothing, one what is no number, and one gives itself out for a rank."""
    made = remotes(tmp_path)
    card = Card.of(Meeting(tmp_path / "ranks").get("line-0"))
    silent, loud, false = (socket.create_connection((card.address, card.port)) for _ in range(3))
    silent.shutdown(socket.SHUT_WR)
    loud.sendall(b"GET / HTTP/1.1\r\n\r\n plus more than a rank says")
    false.sendall((1).to_bytes(4, "big") + bytes(16))
    lines = connected(made)
    lines[1][0].sendall(b"x")
    assert lines[0][1].recv(1) == b"x"
    for stranger in (silent, loud, false):
        stranger.settimeout(10.0)
        with contextlib.suppress(ConnectionResetError):  # it had sent more than was read
            assert stranger.recv(1) == b""


def test_an_interface_without_an_address_is_named() -> None:
    with pytest.raises(OSError, match="nowhere0 has no address"):
        address_of("nowhere0")


def test_who_is_gone_is_noticed(tmp_path: Path) -> None:
    lines = connected(remotes(tmp_path))
    lines[1][0].close()
    with pytest.raises(ConnectionError, match="process 1 is gone"):
        Lines(lines[0]).exchanged(memoryview(b"something"))


@pytest.mark.parametrize(("hosts", "processes"), [(2, 1), (2, 2), (3, 1)])
def test_what_ranks_do_together_they_do_over_hosts(hosts: int, processes: int, tmp_path: Path) -> None:
    found = apart(hosts, processes, tmp_path / "ranks", exchanged)
    size = hosts * processes
    for rank, said in enumerate(found):
        assert said["rank"] == rank
        assert said["leads"] == (rank % processes == 0)
        assert torch.equal(said["total"], torch.full((3,), float(sum(range(size)))))
        assert torch.equal(said["large"], torch.full((1 << 18,), float(sum(range(size)))))
        assert said["listed"] == list(range(size))
        assert said["told"] == "from 0"
