"""The API as a process of its own: flat memory under uploads, a clean end, a warning where it is open."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from app.launch import free_port
from tests.app.service import HANG_SECONDS, Service
from tests.app.uploads.resumable import create, patch

MIB = 1 << 20
MAX_GROWTH = 64 * MIB
CHUNK = os.urandom(MIB)


@contextlib.contextmanager
def api_process(folder: Path, **settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`tersor api` on a free port of loopback."""
    port = free_port()
    env = os.environ | {
        "TERSOR_DATA_DIR": str(folder),
        "TERSOR_PORT": str(port),
        "TERSOR_BROKER_URL": "redis://127.0.0.1:1/0",
        **settings,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "app.cli", "api"], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/healthz")
                break
            time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.wait()


def raw(size: int) -> Iterator[bytes]:
    for _ in range(size // MIB):
        yield CHUNK


def form(size: int) -> Iterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="m"\r\n\r\n'
    yield from raw(size)
    yield b"\r\n--x--\r\n"


def post(url: str, size: int, way: str) -> None:
    """An upload in one request."""
    kind = "multipart/form-data; boundary=x" if way == "form" else "application/octet-stream"
    body = form(size) if way == "form" else raw(size)
    answer = httpx.post(f"{url}/v1/models", content=body, headers={"Content-Type": kind}, timeout=600)
    assert answer.status_code == 201, answer.text
    assert answer.json()["size_bytes"] == size


def resume(url: str, size: int, half: int) -> None:
    """A resumable one, of which `half` has come already."""
    with httpx.Client(base_url=url, timeout=600) as http:
        upload = http.get("/v1/uploads").json()["items"][0]["id"]
        assert patch(http, f"/v1/uploads/{upload}", half, raw(size - half)).status_code == 204
        assert http.post("/v1/models", json={"upload": upload}).json()["size_bytes"] == size


def growth(process: subprocess.Popen[bytes], upload: Callable[[], None]) -> int:
    """Bytes of resident memory that the API process gains at most while it takes an upload."""
    api = psutil.Process(process.pid)
    before, peak, done = api.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], api.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        upload()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


@pytest.mark.parametrize("way", ["raw", "form"])
@pytest.mark.parametrize("size", [256 * MIB, pytest.param(2048 * MIB, marks=pytest.mark.slow)], ids=["256MB", "2GB"])
def test_memory_stays_flat(tmp_path: Path, size: int, way: str) -> None:
    with api_process(tmp_path) as (url, process):
        httpx.post(f"{url}/v1/models", content=b"warm").raise_for_status()
        assert growth(process, lambda: post(url, size, way)) < MAX_GROWTH


@pytest.mark.parametrize("size", [256 * MIB, pytest.param(2048 * MIB, marks=pytest.mark.slow)], ids=["256MB", "2GB"])
def test_memory_stays_flat_after_a_restart_amid_an_upload(tmp_path: Path, size: int) -> None:
    """What had come before is read back to go on with its hash."""
    half = size // 2
    with api_process(tmp_path) as (url, process), httpx.Client(base_url=url, timeout=600) as http:
        assert patch(http, create(http, size), 0, raw(half)).status_code == 204
        process.kill()
    with api_process(tmp_path) as (url, process):
        httpx.post(f"{url}/v1/models", content=b"warm").raise_for_status()
        assert growth(process, lambda: resume(url, size, half)) < MAX_GROWTH


def test_those_who_wait_are_answered_when_it_ends(tmp_path: Path) -> None:
    with api_process(tmp_path) as (url, process):
        model = httpx.post(f"{url}/v1/models", content=b"x").json()["id"]
        answers: list[httpx.Response] = []

        def wait() -> None:
            answers.append(httpx.get(f"{url}/v1/models/{model}", headers={"Prefer": "wait=60"}, timeout=HANG_SECONDS))

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        waiting.join(HANG_SECONDS)
        # uvicorn raises the signal again once everything is closed, so that its parent sees the cause.
        assert process.wait(HANG_SECONDS) in (0, -signal.SIGTERM)
    assert [answer.json()["status"] for answer in answers] == ["inspecting"]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_log_lines_carry_the_request(tmp_path: Path) -> None:
    with api_process(tmp_path) as (url, process):
        answer = httpx.post(f"{url}/v1/models", content=b"", headers={"X-Request-Id": "find-me"})
        assert answer.status_code == 400
        assert "server" not in answer.headers
        process.terminate()
        process.wait(HANG_SECONDS)
    log = (tmp_path / "log").read_text()
    assert "[find-me]: POST '/v1/models' 400" in log
    assert "OPEN TO ANYONE" not in log


def test_a_long_spec_fits_into_the_query(service: Service) -> None:
    with contextlib.closing(http.client.HTTPConnection(service.url.removeprefix("http://"))) as connection:
        connection.request("POST", f"/v1/models?spec={'+' * 100_000}%7B%7D", body=b"x")
        assert connection.getresponse().status == 201
