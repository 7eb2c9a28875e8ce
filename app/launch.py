"""A whole service as a child process, on a free port: for the demo, for tests, for benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from app.contract.errors import ServiceUnavailable

READY_SECONDS = 120.0  # the first start reads torch from a cold disk
STOP_SECONDS = 20.0


@contextlib.contextmanager
def service(folder: Path, **settings: str) -> Iterator[str]:
    """A whole service on a free loopback port, with its data under `folder`; yields its URL and ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "app.cli", "up", "--port", str(port), "--data-dir", str(folder / "data")]
    log = folder / "tersor.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | settings, start_new_session=True
        )
    try:
        _wait_ready(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise ServiceUnavailable(f"The service did not become ready. Its log ends:\n{log.read_text()[-4000:]}")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
