"""A large upload over a bad line, to a service that is killed: right in the end, and nothing is sent twice.

RESUME_BYTES sets its size. It takes three times that on disk: the file, the service's copy, the worker's.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from app.client import Client
from tests.acceptance.conftest import Service
from tests.acceptance.test_faults import breakable
from tests.app.wire import Wire, wire

SIZE = int(os.environ.get("RESUME_BYTES", 4_000_000_000))
CUTS = 20
BLOCK = 1 << 20

__all__ = ["breakable"]  # a fixture


def random_file(path: Path, size: int) -> str:
    """Writes random bytes; their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while left := size - file.tell():
            block = os.urandom(min(BLOCK, left))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def api_of(tersor: Service) -> psutil.Process:
    """The API's process."""
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-1:] == ["api"] and process.environ().get("TERSOR_DATA_DIR") == str(tersor.data):
                return process
        except psutil.Error:
            continue
    raise LookupError("no API process")


def kill_at(tersor: Service, between: Wire, count: int) -> None:
    """`kill -9` of the API once so many bytes have been sent; `tersor up` starts another."""
    while between.total < count:
        time.sleep(0.005)
    api_of(tersor).send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_large_file_arrives_over_twenty_cuts_and_a_kill(
    breakable: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.bin"
    expected = random_file(path, SIZE)
    chance = random.Random(20)
    cuts = sorted(chance.sample(range(1, SIZE), CUTS))
    with wire(breakable.url, cuts) as between, Client(between.url) as client:
        before, after = max(pairwise([0, *cuts, SIZE]), key=lambda pair: pair[1] - pair[0])
        killer = threading.Thread(target=kill_at, args=(breakable, between, (before + after) // 2))  # amid a request
        killer.start()
        started = time.monotonic()
        dataset = client.upload_dataset(path)
        seconds = time.monotonic() - started
        killer.join()
    assert (dataset["sha256"], dataset["size_bytes"]) == (expected, SIZE)
    assert between.broken == CUTS
    assert len(between.sent) >= CUTS + 2  # the first, and one after every cut and after the kill
    twice = sum(sent.sent_twice for sent in between.sent)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{SIZE:,} bytes, {CUTS} cuts and one kill -9 in {seconds:.0f} s ({SIZE / 1e6 / seconds:.0f} MB/s): "
            f"{len(between.sent)} requests sent {between.total:,} bytes, {between.total / SIZE - 1:.2%} more than the "
            f"file has; {twice:,} of them had been acknowledged before.\n"
        )
    assert twice == 0
