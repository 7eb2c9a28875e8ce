"""Small messages between processes of one machine."""

from __future__ import annotations

import threading

import pytest

from worker.ranks.lines import Gone, Lines, pairs


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("length", [1, 1000, 3_000_000])  # the last is more than a socket holds
def test_all_hear_all(size: int, length: int) -> None:
    lines = [Lines(ends) for ends in pairs(size)]
    messages = [bytes([rank]) * length for rank in range(size)]
    heard: dict[int, dict[int, bytearray]] = {}

    def exchange(rank: int) -> None:
        for _ in range(3):
            heard[rank] = lines[rank].exchanged(memoryview(messages[rank]))

    threads = [threading.Thread(target=exchange, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        assert heard[rank] == {other: messages[other] for other in range(size) if other != rank}


def test_whoever_waits_for_one_that_is_gone_is_told() -> None:
    ends = pairs(2)
    ends[1][0].close()
    with pytest.raises(Gone, match="process 1 is gone"):
        Lines(ends[0]).exchanged(memoryview(b"word"))


def test_one_that_goes_while_others_wait() -> None:
    ends = pairs(2)
    going = threading.Timer(0.2, ends[1][0].close)  # by then the other sleeps
    going.start()
    with pytest.raises(Gone):
        Lines(ends[0]).exchanged(memoryview(b"word"))
    going.join()


def test_nothing_is_said_at_once() -> None:
    assert Lines(pairs(2)[0]).exchanged(memoryview(b"")) == {1: bytearray()}
