"""`tersor up`: the whole service in the foreground, in one process group: broker, API, worker; ends as one."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import httpx

from app.broker import EmbeddedBroker
from app.contract.errors import Conflict
from app.settings import Settings

log = logging.getLogger("tersor.up")

POLL_SECONDS = 0.2
STOP_SECONDS = 15.0  # a worker needs a few to hand its jobs back
MAX_BACKOFF_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """One supervised process; started again with growing pauses when it dies."""

    name: str
    argv: list[str]
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    backoff: float = 0.5
    restart_at: float = field(default=0.0)

    def start(self) -> None:
        self.process = subprocess.Popen(self.argv, env=self.env, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        self.started_at = time.monotonic()

    def watch(self) -> None:
        """Notices a death and starts the process again when its pause is over."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            log.warning("%s ended with %s; starting it again", self.name, self.process.returncode)
            healthy = now - self.started_at > MAX_BACKOFF_SECONDS
            self.backoff = 0.5 if healthy else min(2 * self.backoff, MAX_BACKOFF_SECONDS)
            self.restart_at = now + self.backoff
            self.process = None
        if self.process is None and now >= self.restart_at:
            self.start()

    def stop(self, deadline: float) -> None:
        """SIGKILL for a process that has not left by the deadline."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT. Raises Conflict when another `tersor up` owns the data folder."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_free(settings)
    with _exclusive(settings.data_dir), _stop_signal() as stopping:
        broker = EmbeddedBroker(settings) if not settings.broker_url else None
        if broker is not None:
            broker.start()
        children = _children(settings)
        try:
            for child in children:
                child.start()
            threading.Thread(target=_announce, args=(settings, stopping), daemon=True).start()
            while not stopping.wait(POLL_SECONDS):
                for child in children:
                    child.watch()
                if broker is not None and broker.ensure_running():
                    log.warning("the broker had died; it runs again")
        finally:
            _stop(children)
            if broker is not None:
                broker.stop()


def _require_free(settings: Settings) -> None:
    """Raises Conflict for an address that cannot be bound: the API would die and be started again for ever."""
    try:
        family, *_ = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        raise Conflict(
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror or error}. Give another --port."
        ) from None


def _children(settings: Settings) -> list[Child]:
    env = dict(os.environ) | {
        "TERSOR_DATA_DIR": str(settings.data_dir.resolve()),
        "TERSOR_HOST": settings.host,
        "TERSOR_PORT": str(settings.port),
    }
    return [
        Child("api", [sys.executable, "-m", "app.cli", "api"], env),
        Child("worker", [sys.executable, "-m", "app.cli", "worker"], env),
    ]


def _stop(children: list[Child]) -> None:
    for child in children:
        if child.process is not None:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        child.stop(deadline)


def _announce(settings: Settings, stopping: threading.Event) -> None:
    """Says when the service is ready to be used."""
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host  # noqa: S104 - compared, not bound
    url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    while not stopping.wait(POLL_SECONDS):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == httpx.codes.OK:
                log.info("ready on %s (data in %s)", url, settings.data_dir.resolve())
                return


@contextlib.contextmanager
def _exclusive(data_dir: Path) -> Iterator[IO[str]]:
    with (data_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another `tersor up` runs on {data_dir}. Stop it, or give another --data-dir.") from None
        yield lock


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    stopping = threading.Event()

    def handle(_signum: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """A killed `tersor up` leaves no API and no worker behind (Linux; elsewhere they end when the broker is gone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
